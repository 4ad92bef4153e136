"""What runs a language model for the service."""
