"""The ``unweave`` command: a thin layer over ``methods`` that parses, shows and reports."""
