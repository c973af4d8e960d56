"""The gallery of a run: a page and a contact sheet of a sample of its images."""
