"""What runs a language model behind the service."""
