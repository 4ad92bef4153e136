"""The page at `/`: static files of this package, and the headers that they are sent with."""
