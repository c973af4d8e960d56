"""The publication on the Hugging Face Hub."""
