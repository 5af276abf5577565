"""Behaviours found without supervision, with a circuit each."""
