"""Changes made to a model from outside, so that it is faster or smaller."""
