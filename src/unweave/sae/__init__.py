"""Sparse autoencoders (SAEs): inference, training, formats, edits, attribution, records."""
