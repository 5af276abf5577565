"""Training SAEs, many at once, on one stream of activations."""
