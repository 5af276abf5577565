"""Labels for latents, of texts that have tags."""
