"""The LoRAs of the demo model: a style, and two that make it read an image as a condition."""
