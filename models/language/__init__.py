"""Language models: checkpoints, tokenizers, decoders, KV caches, sampling, drafts."""
