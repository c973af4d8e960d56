"""Downloads of models from hubs and buckets: complete or not at all."""
