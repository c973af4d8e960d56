"""The work on a shard: rows -> batches -> images -> staged -> commit; knows neither model nor cluster."""
