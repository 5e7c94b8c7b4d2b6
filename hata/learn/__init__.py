"""Learning to hash: from a model and some text to an encoder file.

    hata learn --model PATH --text FILES --bits 256 --out encoder.safetensors

`hata.calibration` reads with a model, `capture` writes what its layers attend with to disk,
`samples` brings it back a layer at a time, a recipe (`listwise`, ours; `hata_recipe` and
`hashattention`, baselines) trains that layer, and `trainer` does so for all of them, spread over
processes, and resumes. See docs/learning.md. Needs torch and transformers (the `learn` extra);
importing this package alone does not load them.
"""
