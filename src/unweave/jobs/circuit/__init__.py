"""The stages of ``unweave circuit``."""
