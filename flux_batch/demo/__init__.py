"""The small model and the prompts that ship with the package."""
