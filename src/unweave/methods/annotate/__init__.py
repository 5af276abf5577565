"""Latents one by one, to write down what they mean."""
