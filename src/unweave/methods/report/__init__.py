"""One page from the results of any finished runs."""
