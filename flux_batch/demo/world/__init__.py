"""The world of the demo model: scenes, their captions and drawings, and the reader of images."""
