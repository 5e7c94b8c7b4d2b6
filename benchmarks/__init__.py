"""Benchmarks of speed. `python -m benchmarks.ops --help` lists what can be measured.

- `benchmarks.ops`: the ops against dense attention; the command line and the tables
- `benchmarks.shapes`: what is measured: shapes and suites
- `benchmarks.contenders`: the callables that are timed, one table per family
- `benchmarks.check`: a result is checked before it is timed
- `benchmarks.timing`: the clocks, one per kind of device
"""
