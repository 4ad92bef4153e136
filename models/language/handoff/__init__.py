"""Split one language model by layers between device and cloud: exits, coded hidden states, approximate KV."""
