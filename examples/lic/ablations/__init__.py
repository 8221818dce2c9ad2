"""Ablations of balanced training; ``python -m examples.lic.ablations`` measures each of them."""
