"""The report page of a run: what it made, when, where the time went, and what went wrong."""
