"""Measurements of what balancing costs; each prints a table."""
