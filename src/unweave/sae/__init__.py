"""Sparse autoencoders: inference, training, formats, edits, attribution, records."""
