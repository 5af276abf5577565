"""SHIFT: a classifier forgets what it should not rely on."""
