"""Prompts on the device: local decoding, speculative decoding, handoff."""
