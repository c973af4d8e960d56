"""The data set on its way out: names, formats, metadata, staging, commits, lease."""
