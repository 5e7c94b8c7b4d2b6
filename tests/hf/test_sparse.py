"""With a small budget, what is attended to is what brute force selects."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import hata  # noqa: E402
import hata.hf  # noqa: E402

POLICIES = {
    "k": hata.Selection(bits=64, k=5, dense_layers=1),
    "sink-recent": hata.Selection(bits=32, k=7, sink=2, recent=3, dense_layers=0),
    "ratio": hata.Selection(bits=96, k=20, ratio=0.25, k_min=4, dense_layers=1),
    "min-length": hata.Selection(bits=64, k=5, min_length=20, dense_layers=1),
}
MODES = {
    "greedy": ({}, False),
    "padded": ({}, True),
    "beams": ({"num_beams": 3}, False),
    "chunked-prefill": ({"prefill_chunk_size": 7}, False),
    "static": ({"cache_implementation": "static"}, False),
    "static-padded": ({"cache_implementation": "static"}, True),
    "static-beams": ({"cache_implementation": "static", "num_beams": 2}, True),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", POLICIES)
def test_selected_keys_are_those_of_brute_force(
    policy, mode, tiny, prompts, answer, by_brute_force, calls
):
    model, (kwargs, padded) = tiny("llama"), MODES[mode]
    inputs = prompts.padded() if padded else prompts.of(1, 23)
    own = answer(model, inputs, **kwargs)
    with hata.hf.attach(model, selection=POLICIES[policy]) as handle:
        got = answer(model, inputs, **kwargs)
    expected = by_brute_force(model, handle, inputs, **kwargs)
    assert torch.equal(expected.tokens, got.tokens)
    torch.testing.assert_close(expected.logits, got.logits, rtol=1e-3, atol=1e-3)
    assert calls
    assert not torch.allclose(own.logits, got.logits, atol=1e-2), "nothing was left out"


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_other_families(family, tiny, prompts, answer, by_brute_force):
    model, ids = tiny(family), prompts.of(1, 23)
    with hata.hf.attach(model, selection=POLICIES["k"]) as handle:
        got = answer(model, ids)
    expected = by_brute_force(model, handle, ids)
    assert torch.equal(expected.tokens, got.tokens)
    torch.testing.assert_close(expected.logits, got.logits, rtol=1e-3, atol=1e-3)


def test_half_precision(fresh, prompts, answer, by_brute_force):
    model, ids = fresh("llama").to(torch.bfloat16), prompts.of(1, 23)
    with hata.hf.attach(model, selection=POLICIES["k"]) as handle:
        got = answer(model, ids, max_new_tokens=2)
    expected = by_brute_force(model, handle, ids, max_new_tokens=2)
    torch.testing.assert_close(expected.logits, got.logits, rtol=0.1, atol=0.5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_key_norms_weight_the_scores(cache, tiny, prompts, answer, calls):
    """An encoder that asks for key norms gets them, in step with the keys."""
    model, ids = tiny("llama"), prompts.of(1, 23)
    kwargs = {"cache_implementation": "static"} if cache == "static" else {}
    encoder = hata.Encoder.random(model.config, 64, key_norms=True)
    with hata.hf.attach(model, encoder, selection=POLICIES["k"]):
        got = answer(model, ids, **kwargs)
    assert calls
    assert all(call["key_norms"] is not None for call in calls)
    layer = got.cache.layers[1]
    length = 23 + 10 - 1
    norms = layer.keys[:, :, :length].norm(dim=-1)
    torch.testing.assert_close(layer.norms[:, :, :length].float(), norms, rtol=1e-3, atol=1e-3)


def test_bias_of_an_encoder_is_used(tiny, prompts, answer, calls):
    import numpy as np

    model, ids = tiny("llama"), prompts.of(1, 23)
    plain = hata.Encoder.random(model.config, 64)
    # So large that every bit is set: all distances are 0 and the lowest positions win.
    biases = tuple(np.full((2, 64), 1e4, np.float32) for _ in range(3))
    encoder = hata.Encoder(plain.shape, 64, plain.projections, biases)
    with hata.hf.attach(model, encoder, selection=POLICIES["k"]):
        got = answer(model, ids)
    assert calls[0]["bias"] is not None
    assert (got.cache.layers[1].codes[:, :, :30] == 255).all()
