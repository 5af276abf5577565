"""Which candidates are ablated, and the random controls beside them."""
