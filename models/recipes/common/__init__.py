"""What recipes of both wings use."""
