"""Rows in: files of prompts, their formats, and one row -> one request."""
