"""Worked examples; run them from the root of the repository, as ``python -m examples.lic``."""
