"""What becomes of SAEs when their model is compressed: kept, pruned, or trained anew."""
