"""Fine-tuning under a condition: chosen latents or directions are ablated, penalised or added while a model learns."""
