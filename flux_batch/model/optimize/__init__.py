"""What is changed in a model from outside, to be faster or smaller."""
