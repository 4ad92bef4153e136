"""Cameras, clips and folders watched frame by frame: what is new is answered, and every frame is accounted for."""
