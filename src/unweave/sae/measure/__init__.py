"""How faithful an SAE is, in a model."""
