"""Measurements, grouped by what they measure.

- `speed`: time, memory and accuracy of the library on synthetic data; writes docs/benchmarks.md.
- `worth`: trials of a weight search that a balanced run saves, on small problems; writes
  docs/worth.md.
- `lic`: learned image compression; trains codecs and writes docs/lic_report.md.
- `capture.py`, `step_length.py`, `coverage.py`: single questions, each with a table in the manual.
- `settings.py`, `sources.py`, `markdown.py`: what groups share: the command line's settings, the
  machine, its versions; source code in the keys of results; tables.
"""
