"""The tuner: `python -m tune`, also `hata tune`.

It finds the fastest right configuration of every kernel on this machine, then the cheapest
selection (bits, budget, sink, recent) of every layer that keeps the attention a model needs, and
writes both to a profile. `session` tells what happens in which order; docs/structure.md, what each
file holds. Nothing imports this package; it uses the public parts of `hata` and reaches kernels by
name only. Inputs, clocks and tolerances are those of `hata.measure`.
"""
