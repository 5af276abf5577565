"""Circuits as things: what one is, how it is found, ablated and drawn."""
