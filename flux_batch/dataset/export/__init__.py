"""The export of a run: its images, or a selection of them, as a data set elsewhere."""
