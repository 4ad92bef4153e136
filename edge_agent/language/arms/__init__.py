"""The ways of answering a prompt."""
