"""Which latents cause a behaviour, and how far estimates of that can be believed."""
