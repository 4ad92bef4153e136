"""Boxes: what device, cloud and recipes compute of them alike. NumPy only."""
