"""Language models: sessions, scheduling, continuous batching."""
