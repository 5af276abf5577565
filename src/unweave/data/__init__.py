"""Text to tokens to activations."""
