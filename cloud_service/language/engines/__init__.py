"""What runs the language models of the service: our own decoder, or a server over HTTP."""
