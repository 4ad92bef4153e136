"""Where the outcomes of frames go."""
