"""The job file: one frozen, validated tree of settings, and its text."""
