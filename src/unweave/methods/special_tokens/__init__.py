"""Errors on special tokens and by role; steering with their latents."""
