"""Encoders of every kind in an attached model: with any cache, the keys that their codes choose."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hata  # noqa: E402
import hata.hf  # noqa: E402
from hata.encoder import Encoder, Hidden, ModelShape, QueryHash  # noqa: E402
from hata.evaluate import decoding  # noqa: E402
from hata.evaluate.selectors import Coded, lowest_first  # noqa: E402
from hata.hf.layer_plan import LayerPlan  # noqa: E402
from hata.hf.models import cache_argument  # noqa: E402

# What this release calls the cache.
CACHE = cache_argument(transformers.LlamaForCausalLM)

LAYERS, H, HKV, D = 3, 4, 2, 16
POLICY = decoding.Policy(0.25, 1, 0, 0, 64)
SELECTION = hata.Selection(bits=64, k=16, ratio=0.25, dense_layers=1)


def normal(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def make(key_heads=HKV, codes=HKV, key_widths=(), query_widths=(), norms=False):
    """An encoder of random weights: heads of the keys' and the queries' side, hidden widths."""
    rng = np.random.default_rng(7)

    def side(heads, widths):
        sizes = (D, *widths)
        hidden = tuple(
            Hidden(normal(rng, heads, a, b) / a**0.5, normal(rng, heads, b) / 4)
            for a, b in zip(sizes, widths, strict=False)
        )
        return normal(rng, heads, sizes[-1], 64), normal(rng, heads, 64) / 4, hidden

    keys = [side(key_heads, key_widths) for _ in range(LAYERS)]
    return Encoder(
        ModelShape("llama", LAYERS, H, HKV, D),
        64,
        tuple(one[0] for one in keys),
        tuple(one[1] for one in keys),
        norms,
        queries=tuple(QueryHash(*side(codes, query_widths)) for _ in range(LAYERS)),
        hidden=tuple(one[2] for one in keys),
    )


KINDS = {
    "query-projection": make(),
    "codes-per-query-head": make(codes=H),
    "several-codes": make(codes=3 * H),
    "several-codes-norms": make(codes=2 * H, norms=True),
    "networks": make(codes=H, key_widths=(24, 32), query_widths=(48,)),
    "query-network": make(codes=2 * H, query_widths=(32,)),
    "keys-per-query-head": make(key_heads=H, codes=H, key_widths=(32,), query_widths=(32,)),
}
PER_HEAD = "keys-per-query-head"
MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "chunked-prefill": {"prefill_chunk_size": 7},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != PER_HEAD])
def test_the_keys_are_those_of_the_codes(kind, mode, tiny, prompts, answer, always_hash):
    model, encoder, ids = tiny("llama"), KINDS[kind], prompts.of(1, 31)
    with hata.hf.attach(model, encoder, selection=SELECTION):
        got = answer(model, ids, **MODES[mode])
    plain = {name: value for name, value in MODES[mode].items() if name == "num_beams"}
    with decoding.simulated(model, Coded("codes", encoder), POLICY).open():
        expected = answer(model, ids, **plain)
    assert torch.equal(got.tokens, expected.tokens)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-3, atol=1e-3)
    own = answer(model, ids, **plain)
    assert not torch.allclose(own.logits, got.logits, atol=1e-2), "nothing was left out"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != PER_HEAD])
def test_fewer_bits_are_the_first_ones(kind, tiny, prompts, answer, always_hash):
    model, encoder, ids = tiny("llama"), KINDS[kind], prompts.of(1, 31)
    selection = hata.Selection(bits=32, k=16, ratio=0.25, dense_layers=1)
    with hata.hf.attach(model, encoder, selection=selection):
        got = answer(model, ids)
    with decoding.simulated(model, Coded("codes", encoder, 32), POLICY).open():
        expected = answer(model, ids)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-3, atol=1e-3)


def test_a_cropped_cache_is_hashed_anew(tiny, prompts, answer, always_hash):
    """Keys behind hidden layers are encoded by the cache, not by the op: their codes keep step."""
    from transformers import DynamicCache

    model, ids = tiny("llama"), prompts.of(1, 31)
    with hata.hf.attach(model, KINDS["networks"], selection=SELECTION):
        expected = answer(model, ids)
        cache = DynamicCache(config=model.config)
        first = answer(model, ids[:, :25], **{CACHE: cache}, max_new_tokens=4)
        cache.crop(25 - cache.get_seq_length())
        got = answer(model, ids, **{CACHE: first.cache})
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-3, atol=1e-3)


def test_key_codes_per_query_head_know_no_longer_dense_range(tiny, prompts):
    """What a static cache cannot do is refused, not left out."""
    selection = hata.Selection(bits=64, k=8, min_length=20, dense_layers=0)
    model, ids = tiny("llama"), prompts.of(1, 31)
    with (
        hata.hf.attach(model, KINDS[PER_HEAD], selection=selection),
        pytest.raises(hata.AttachError, match="min_length 20 above k"),
    ):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")


def test_compiled_whole(tiny, prompts):
    """Several codes per query head in a static cache under `fullgraph=True`."""
    from transformers import StaticCache

    model, ids = tiny("llama"), prompts.of(1, 31)

    def run(decode):
        cache = StaticCache(config=model.config, max_cache_len=40)
        seen, found = torch.ones_like(ids), []
        with torch.no_grad():
            model(ids, attention_mask=seen, **{CACHE: cache})
            for token in prompts.of(1, 3).split(1, 1):
                seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
                made = model.prepare_inputs_for_generation(
                    token, **{CACHE: cache}, attention_mask=seen, use_cache=True
                )
                found.append(decode(**made).logits)
        return torch.cat(found, 1)

    torch._dynamo.reset()
    with hata.hf.attach(model, KINDS["several-codes"], selection=SELECTION):
        eager = run(model)
        compiled = run(torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch._dynamo.reset()
    torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["greedy", "static"])
def test_key_codes_per_query_head_choose_for_each_head(
    mode, tiny, prompts, answer, always_hash, monkeypatch
):
    """As HashAttention does: every query head attends to what its own codes choose."""
    model, encoder, ids = tiny("llama"), KINDS[PER_HEAD], prompts.of(1, 31)
    seen = []
    original = hata.sparse_attend

    def spy(query, keys, values, indices, **kwargs):
        seen.append((query, keys, indices))
        return original(query, keys, values, indices, **kwargs)

    monkeypatch.setattr(hata, "sparse_attend", spy)
    with hata.hf.attach(model, encoder, selection=SELECTION):
        answer(model, ids, **MODES[mode], max_new_tokens=4)
    # The first token comes from the prefill.
    assert len(seen) == 3 * (LAYERS - 1)
    for number, (query, keys, indices) in enumerate(seen):
        layer, step = 1 + number % (LAYERS - 1), number // (LAYERS - 1)
        placed = LayerPlan(encoder, layer, SELECTION).on(query)
        visible = keys[:, :, : ids.shape[1] + 1 + step]
        scores = (placed.query_signs(query) @ placed.key_signs(visible).mT)[0, :, 0]
        k = visible.shape[2] // 4
        expected = lowest_first(scores, k)
        assert torch.equal(indices[0, :, 0, :k].long(), expected)
        assert (indices[0, :, 0, k:] == -1).all()
