"""What fine-tuning could learn from: latents by their effect, or by how a fine-tuned model differs."""
