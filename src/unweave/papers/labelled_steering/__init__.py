"""Steering LLMs? Actually, sparse autoencoders can outperform simple baselines.

The paper labels SAE latents by texts that have tags, selects pairs of latent and label by calibrated F1 and output
score, and steers with them on AxBench: about as well as LoRA, not as well as prompting.
"""
