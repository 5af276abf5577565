"""How faithful an SAE is."""
