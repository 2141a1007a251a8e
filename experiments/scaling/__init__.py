"""Scaling studies of the training step: measured on local devices, or compiled for TPUs."""
