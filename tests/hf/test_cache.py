"""Codes stay in step with keys, whatever happens to a cache."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from transformers import DynamicCache, StaticCache  # noqa: E402

import hata  # noqa: E402
import hata.hf  # noqa: E402

FEW = hata.Selection(bits=64, k=4, dense_layers=0)


def in_step(layer, length=None):
    """Whether the codes that a layer counts on are the codes of its keys."""
    length = getattr(layer, "coded", None) if length is None else length
    keys = layer.keys[:, :, :length].contiguous()
    expected = hata.encode(keys, layer.placed.projection, layer.placed.bias)
    return torch.equal(expected, layer.codes[:, :, :length])


@pytest.fixture
def attached(tiny):
    with hata.hf.attach(tiny("llama"), selection=FEW), torch.no_grad():
        yield tiny("llama")


def filled(model, prompts, rows=2, tokens=20, steps=3):
    cache = DynamicCache(config=model.config)
    model(prompts.of(rows, tokens), past_key_values=cache)
    for token in prompts.of(rows, steps).split(1, 1):
        model(token, past_key_values=cache)
    return cache


OPERATIONS = {
    "crop": lambda cache: cache.crop(-7),
    "crop-nothing": lambda cache: cache.crop(0),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "repeat-then-select": lambda cache: (
        cache.batch_repeat_interleave(2),
        cache.batch_select_indices(torch.tensor([3, 0])),
    ),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_fault_62_codes_follow_their_keys(operation, attached, prompts):
    cache = filled(attached, prompts)
    OPERATIONS[operation](cache)
    expected = 23 - 7 if operation == "crop" else 23
    for token in prompts.of(2, 4).split(1, 1):
        for layer in cache.layers:
            assert layer.coded <= layer.keys.shape[2] == expected
            assert in_step(layer)
        attached(token, past_key_values=cache)
        expected += 1
        assert all(layer.coded == expected for layer in cache.layers)
    assert all(map(in_step, cache.layers))


def test_fault_62_reset_forgets(attached, prompts):
    cache = filled(attached, prompts)
    cache.reset()
    assert all(layer.coded == 0 for layer in cache.layers)
    attached(prompts.of(2, 9), past_key_values=cache)
    attached(prompts.of(2, 1), past_key_values=cache)
    assert all(map(in_step, cache.layers))


def test_fault_62_static_cache(attached, prompts):
    cache = StaticCache(config=attached.config, max_cache_len=32)
    for rows, tokens in ((2, 11), (2, 1), (2, 1), (2, 4), (2, 1)):
        attached(prompts.of(rows, tokens), past_key_values=cache)
    assert all(in_step(layer, 18) for layer in cache.layers)
    cache.reorder_cache(torch.tensor([1, 0]))
    attached(prompts.of(2, 1), past_key_values=cache)
    assert all(in_step(layer, 19) for layer in cache.layers)
    cache.reset()
    attached(prompts.of(2, 5), past_key_values=cache)
    attached(prompts.of(2, 1), past_key_values=cache)
    assert all(in_step(layer, 6) for layer in cache.layers)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_codes_catch_up_after_steps_without_us(kind, tiny, prompts):
    """Detached, the same cache goes on; attached again, the keys of that time get codes."""
    model = tiny("llama")
    cache = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=40)
    with torch.no_grad():
        for attach in (True, False, True):
            handle = hata.hf.attach(model, selection=FEW) if attach else None
            for tokens in (6, 1, 1, 1):
                model(prompts.of(1, tokens), past_key_values=cache)
            if handle is not None:
                handle.detach()
    assert all(in_step(layer, 27) for layer in cache.layers)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_fault_61_a_cache_filled_before_attach(kind, tiny, prompts):
    model = tiny("llama")
    ids, steps = prompts.of(2, 20), prompts.of(2, 3).split(1, 1)

    def run(attach_first):
        cache = DynamicCache(config=model.config)
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=32)
        handle = hata.hf.attach(model, selection=FEW) if attach_first else None
        with torch.no_grad():
            model(ids, past_key_values=cache)
            handle = handle or hata.hf.attach(model, selection=FEW)
            logits = [model(token, past_key_values=cache).logits for token in steps]
        handle.detach()
        assert all(in_step(layer, 23) for layer in cache.layers)
        return torch.cat(logits)

    torch.testing.assert_close(run(True), run(False))


def test_another_encoder_makes_its_own_codes(tiny, prompts):
    model = tiny("llama")
    with torch.no_grad():
        with hata.hf.attach(model, selection=FEW):
            cache = filled(model, prompts)
        other = hata.Encoder.random(model.config, 128, seed=7)
        with hata.hf.attach(model, other, selection=hata.Selection(bits=128, k=4, dense_layers=0)):
            model(prompts.of(2, 1), past_key_values=cache)
    assert all(layer.codes.shape[-1] == 16 for layer in cache.layers)
    assert all(map(in_step, cache.layers))


def test_steps_do_not_copy_what_is_there(attached, prompts):
    cache = filled(attached, prompts)
    addresses = [(layer.keys.data_ptr(), layer.codes.data_ptr()) for layer in cache.layers]
    for token in prompts.of(2, 8).split(1, 1):
        attached(token, past_key_values=cache)
    assert addresses == [(x.keys.data_ptr(), x.codes.data_ptr()) for x in cache.layers]


def test_no_cache_outlives_its_owner(attached, prompts):
    import gc
    import weakref

    cache = filled(attached, prompts)
    keys = weakref.ref(cache.layers[0].keys)
    del cache
    gc.collect()
    assert keys() is None


def test_inference_mode_then_no_grad(attached, prompts):
    with torch.inference_mode():
        cache = filled(attached, prompts)
    attached(prompts.of(2, 1), past_key_values=cache)
    assert all(map(in_step, cache.layers))


def test_offload_and_prefetch(attached, prompts):
    cache = filled(attached, prompts)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    attached(prompts.of(2, 1), past_key_values=cache)
    assert all(map(in_step, cache.layers))
