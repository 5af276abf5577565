"""Training superior sparse autoencoders for instruct models (Li et al. 2025, arXiv 2506.07691): FAST.

The paper trains SAEs of chat models on whole conversations under the model's template, each on its own (FAST), and
compares with block training on pre-training text, BT(P), and on the same conversations, BT(F), under one token budget.
It measures reconstruction errors of all and of special tokens, has a chat model rate latents from 1 to 5, and steers
with latents of special tokens.
"""
