"""Downloads of models, from hubs and buckets: whole or not at all."""
