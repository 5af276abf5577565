"""Pages, tables and plots: plain values in, text out."""
