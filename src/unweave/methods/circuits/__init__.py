"""Circuits: found, measured, drawn."""
