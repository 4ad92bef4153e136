"""`cloud-service keys`: a small authority for TLS, and the file of tokens, quotas and revoked devices."""
