"""Learned image compression with balanced losses; ``python -m examples.lic`` runs the demo."""
