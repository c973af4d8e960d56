"""What the files of a run are called, relative to its output; README draws them. Never renamed: old runs go on."""

JOB = "_run/job.yaml"
PLAN = "_run/plan.parquet"
COMMITS = "_run/commits"
FAILED = "_run/failed"
PROGRESS = "_run/progress.json"
REPORT = "_run/report.json"
GALLERY = "_run/gallery"
# Half-written files of a killed process stay here, out of sight of whoever loads the data set.
SCRATCH = "_run/tmp"
CARD = "README.md"
SUCCESS = "_SUCCESS"
