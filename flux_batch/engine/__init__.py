"""The engines that run shards: a picklable worker factory goes in, results come out; knows no image, model or file."""
