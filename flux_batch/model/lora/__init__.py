"""LoRAs: files, names of keys, scales, and fusing into the weights of a model."""
