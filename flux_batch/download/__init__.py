"""A model onto this machine: from hubs and buckets, whole or not at all."""
