"""A model on disk: a folder with a manifest, files and one fingerprint."""
