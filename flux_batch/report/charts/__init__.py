"""The report page of a run: images, speed, time by stage, workers and failures."""
