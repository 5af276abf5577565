"""On the transferability of sparse autoencoders for interpreting compressed models (paper 004).

A model is pruned. SAEs of the original one, the same SAEs pruned themselves, and SAEs trained anew on the pruned model
are measured in both models.
"""
