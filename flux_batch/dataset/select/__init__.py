"""The selection of images, stored under a name and reproducible."""
