"""The progress of a run: its figures at one moment, where they are shown, and the status read from an output."""
