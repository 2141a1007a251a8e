"""Conversion of SAM checkpoints, official or Hugging Face, to this project's layout and back."""
