"""Scaling studies of the training step: measured on devices at hand, compiled for TPUs without."""
