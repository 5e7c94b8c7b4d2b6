"""Benchmarks of speed. `python -m benchmarks.ops --help` lists what can be measured.

- `ops`: the ops against dense attention; the command line
- `phases`: when the phases of the CUDA kernels end; a command of its own
- `shapes`: what is measured: shapes and suites; `options`: values of the command lines
- `contenders`: the callables that are timed, one table per family
- `verify`: a result is checked before it is timed
- `beyond`: what no step shows on a GPU
- `gpu`: a kernel that only reads, and times of single kernels
- `bars`: what was measured, and what is wanted; `tables`: both as people read them

Clocks and tolerances are those of `hata.measure`.
"""
