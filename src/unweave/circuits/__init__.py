"""Circuits: which latents cause a behaviour, how they connect, how faithful that is, and what can be done with it."""
