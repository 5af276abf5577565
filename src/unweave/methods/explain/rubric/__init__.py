"""A chat model rates how clear latents are."""
