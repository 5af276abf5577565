"""One folder per paper: its claims, its recipe at two scales, its table and figures."""
