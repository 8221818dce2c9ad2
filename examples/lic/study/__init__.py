"""The evidence: what balanced rate-distortion training gains, against rivals that are fair.

``python -m examples.lic.study`` runs the experiments and writes a page from their results alone.
"""
