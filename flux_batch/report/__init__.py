"""What people read of a run: progress, status, the data set card."""
