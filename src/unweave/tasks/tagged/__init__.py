"""Texts with tags: where they come from, and how they are divided."""
