"""The tuner: `python -m tune`, also `hata tune`.

It finds the fastest right configuration of every kernel on this machine, then the cheapest
selection (bits, budget, sink, recent) of every layer that keeps the attention a model needs, and
writes both to a profile. What each file knows:

- `task`: the command line held against what is here
- `space`: which problems are tuned, and the knobs of each
- `cost`: how long a problem must take, and which configurations look good on paper
- `propose`: which configurations are tried; `ahead`: compiles them before they are
- `trial`: whether a configuration's results are right, and how fast it is
- `worker`: runs the two in a process that may crash or hang
- `search`: who wins; `studies`: what Optuna keeps of it; `database`: the file where
- `capture`: what the layers of a model attend with
- `quality`: how much of it a selection keeps; `selections`: which one each layer gets
- `session`: what happens in which order, and what is written when
- `console`: what people see
- `__main__`: the command line

Nothing imports this package; it uses the public parts of `hata` and reaches kernels by name only.
Inputs, clocks and tolerances are those of `hata.measure`.
"""
