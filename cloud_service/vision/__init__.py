"""The vision wing: queue, batches, predictions."""
