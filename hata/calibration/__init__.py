"""What learning, judging and tuning with a model share: text, and what its layers attend with.

`text` makes sequences of text, `recorder` shows the queries and keys of a model that reads them,
`hashable` tells which layers can be hashed, `options` are command-line options, `progress` is what
a person sees meanwhile. Needs torch and transformers (the `learn` extra); importing this package
alone does not load them.
"""
