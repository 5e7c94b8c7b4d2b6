"""The tuner: `python -m tune`, also `hata tune`.

It finds the fastest right configuration of every kernel on this machine, then the cheapest
selection (bits, budget, sink, recent) of every layer that keeps the attention a model needs, and
writes both to a profile. What each file knows:

- `space`: which problems are tuned, and the knobs of each
- `cost`: how long a problem must take, and which configurations look good on paper
- `measure`: the inputs of a problem, and the clock
- `check`: whether a configuration's results are right
- `worker`: runs the two above in a process that may crash or hang
- `search`: Optuna, and the rules by which a winner is chosen
- `quality`: how much attention a selection keeps
- `report`: what people see
- `__main__`: the command line, and the order of things

Nothing imports this package; it uses the public parts of `hata` and reaches kernels by name only.
"""
