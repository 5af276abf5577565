"""Steering judged as AxBench does."""
