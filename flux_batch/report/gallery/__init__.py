"""A page of the images of a run, and one picture of them."""
