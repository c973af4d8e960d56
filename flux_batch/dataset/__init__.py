"""The finished data set: its images judged, chosen, exported and published."""
