"""Judging a hash: what it keeps of a model's attention, and of what the model can do.

    hata eval --model PATH --text FILES --encoder encoder.safetensors

`mass` is the measure, `selectors` are the ways to choose keys that are compared, `retained` brings
both together over a model's layers. `decoding` lets a model decode with any selector, `tasks` makes
prompts with known answers, `perplexity` reads long text. See docs/learning.md. Needs torch and
transformers (the `learn` extra); importing this package alone does not load them.
"""
