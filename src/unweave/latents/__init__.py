"""What a latent responds to and writes: contexts, records, annotations."""
