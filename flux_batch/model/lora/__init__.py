"""LoRAs: their files, spellings and scales, and how they are merged into weights."""
