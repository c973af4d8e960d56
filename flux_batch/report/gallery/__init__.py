"""A page of the images of a run, and one image of them."""
