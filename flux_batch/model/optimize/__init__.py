"""Changes applied to a model from outside that make it faster or smaller."""
