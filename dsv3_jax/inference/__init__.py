"""Text out: sampling and generation with the latent cache."""
