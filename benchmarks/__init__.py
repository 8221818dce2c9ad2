"""Measurements, grouped by what they measure.

- `speed`: time, memory and accuracy of the library on synthetic data; writes docs/benchmarks.md.
- `lic`: learned image compression; trains codecs and writes docs/lic_report.md.
- `settings.py`: what all groups share: the command line's settings, the machine, its versions.
"""
