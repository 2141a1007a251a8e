"""Conversion of SAM and PGP-SAM checkpoints to this project's layouts and back."""
