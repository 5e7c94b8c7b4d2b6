"""Benchmarks of speed: `ops` and `phases` are commands, docs/structure.md lists the other files.

Clocks and tolerances are those of `hata.measure`.
"""
