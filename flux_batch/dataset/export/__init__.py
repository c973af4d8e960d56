"""The way out of a run: its images, or a selection of them, as a data set somewhere else."""
