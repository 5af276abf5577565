"""What latents mean, in a judge's words, and how much to believe it."""
