"""Tables over SAEs that were measured alike."""
