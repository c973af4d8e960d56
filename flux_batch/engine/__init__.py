"""Where shards run: a picklable worker factory goes in, shard results come out; knows no image, model or file."""
