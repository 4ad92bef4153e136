"""Layers shared between device and cloud: exits, coded hidden states, KV fill."""
