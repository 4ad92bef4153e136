"""Language models: checkpoints, tokenizer, decoder and KV cache, sampling, drafts."""
