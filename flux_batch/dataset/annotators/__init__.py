"""The built-in annotators, and the loading and calling of a user's own."""
