"""A Hugging Face causal language model: loading, sites, taps, chat roles, generation."""
