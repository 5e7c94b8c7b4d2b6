"""What a whole model gains: decode steps timed through plain `generate`.

- `generation`: the ways to decode, and how their steps are timed
- `command`: `hata bench`, for a model of one's own
"""
