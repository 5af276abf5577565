"""Text with a latent turned up."""
