"""Where shards run: a picklable runner goes in, shard results come out; knows no image, model or file."""
