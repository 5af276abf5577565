"""Sparse feature circuits: discovering and editing interpretable causal graphs (Marks et al. 2024, arXiv 2403.19647).

The paper finds circuits of SAE latents behind subject-verb agreement and measures how faithful and complete they are
beside circuits of neurons; removes a classifier's reliance on gender by ablating latents that a person judges beside
the point (SHIFT); and finds circuits for behaviours that clustering discovers.
"""
