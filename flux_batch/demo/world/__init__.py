"""What the demo model knows: scenes, their captions and drawings, and how an image is read back."""
