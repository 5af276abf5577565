"""Products with few latents per token."""
