"""The choice of images: a selection under a name, which can be repeated."""
