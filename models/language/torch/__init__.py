"""The cloud's decoder, in PyTorch."""
