"""The ``unweave`` command: a thin layer over ``jobs`` that parses, shows and reports."""
