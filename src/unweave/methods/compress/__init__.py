"""Models and SAEs with fewer, smaller or coarser weights."""
