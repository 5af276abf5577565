"""One folder per paper: its claims, its recipe at two scales, its table and figures."""

from __future__ import annotations

PAPERS = (
    "papers.instruct_saes",
    "papers.feature_circuits",
    "papers.labelled_steering",
    "papers.concept_ablation",
    "papers.compressed_models",
)
"""In the order of help; each has its command in its ``spec.py``."""
