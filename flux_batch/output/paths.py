"""The names of the files of a run, relative to its output; README.md here draws them. Never renamed: old runs go on."""

JOB = "_run/job.yaml"
PLAN = "_run/plan.parquet"
COMMITS = "_run/commits"
FAILED = "_run/failed"
PROGRESS = "_run/progress.json"
# Who drives the run: one small object an epoch, the last one counts.
LEASE = "_run/lease"
REPORT = "_run/report.json"
GALLERY = "_run/gallery"
# Finished images of shards that are not committed yet, a folder a shard.
STAGING = "_run/staging"
# Commits that are being taken back; what is noted here, the next driver finishes.
TAKEN_BACK = "_run/taken-back"
# How many images a forward pass makes, where the run was to find out itself.
BATCH_SIZE = "_run/batch_size.json"
# Which dtype the run computes in, where its job leaves that open.
PRECISION = "_run/precision.json"
# What torch.compile has made on one worker, for the others: an object a kind of device.
COMPILE_CACHE = "_run/compile_cache"
CARD = "README.md"
SUCCESS = "_SUCCESS"
