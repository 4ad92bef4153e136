"""The language wing: sessions, scheduling, continuous batching."""
