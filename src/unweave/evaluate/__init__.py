"""Measures of SAEs and of the models they sit in."""
