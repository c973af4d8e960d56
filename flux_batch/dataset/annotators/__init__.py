"""The annotators in the package, and how one of yours is found, opened and called."""
