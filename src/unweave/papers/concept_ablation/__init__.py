"""Steering fine-tuning generalization with targeted concept ablation (Casademunt et al. 2025).

A model is fine-tuned on data that two policies explain equally well. Latents of the unintended one are found by
attribution, chosen by what they are about, and taken out while the model learns; it then follows the intended policy
where the two differ, with no edit left in it.
"""
