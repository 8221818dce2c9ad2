"""Latent refinement, SGA and SGA+; ``python -m examples.lic.refinement`` measures what it gains."""
