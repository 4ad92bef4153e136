"""The decoder of the cloud, in PyTorch."""
