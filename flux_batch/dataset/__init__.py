"""The finished data set: annotation, selection, export and publication of its images."""
