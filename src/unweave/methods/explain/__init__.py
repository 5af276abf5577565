"""A chat model says what latents respond to, and its words are tested on contexts that it has not seen."""
