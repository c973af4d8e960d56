"""The LoRAs of the demo model: a style, and two by which it reads an image as a condition."""
