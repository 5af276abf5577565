"""Measures beside the truth, on features that are known."""
