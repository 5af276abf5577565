"""Using latents: which one to steer with, and what the model then writes."""
