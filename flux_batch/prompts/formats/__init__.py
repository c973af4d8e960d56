"""Formats of prompts, a file each behind one protocol: columns, ranges of rows, the rows of a range."""
