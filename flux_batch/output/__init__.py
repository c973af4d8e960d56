"""The output of a run: names of files, formats, metadata, staging, commits, lease."""
