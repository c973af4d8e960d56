"""Reports on a run for people: progress, status, verification, comparison, gallery, charts."""
