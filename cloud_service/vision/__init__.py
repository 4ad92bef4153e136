"""Tails: queue, batches, predictions."""
