"""A model on disk: a folder with a manifest, listed files and one fingerprint."""
