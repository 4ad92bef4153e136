"""Training runs of image models."""
