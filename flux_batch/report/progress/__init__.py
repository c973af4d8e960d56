"""The progress of a run: its current figures, their display, and the status read from an output."""
