"""Language models as people have them: GGUF files, Hugging Face folders, tokenizers."""
