"""Clean and patch states in, effects of nodes out: the only attribution code."""
