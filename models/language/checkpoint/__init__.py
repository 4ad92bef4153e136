"""Read language models from GGUF files and Hugging Face folders, with their tokenizers and chat templates."""
