"""Codes stay in step with keys, whatever happens to a cache."""

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers import DynamicCache, StaticCache  # noqa: E402
from transformers.cache_utils import DynamicLayer, StaticLayer  # noqa: E402

import hata  # noqa: E402
import hata.hf  # noqa: E402
from hata.hf.coded_layer import DYNAMIC, STATIC  # noqa: E402
from hata.hf.models import cache_argument  # noqa: E402

# What this release calls the cache.
CACHE = cache_argument(transformers.LlamaForCausalLM)

FEW = hata.Selection(bits=64, k=4, dense_layers=0)


def in_step(layer, length=None):
    """Whether the codes that a layer counts on are the codes of its keys."""
    length = getattr(layer, "coded", None) if length is None else length
    keys = layer.keys[:, :, :length].contiguous()
    options = layer.hasher.attend_options
    expected = hata.encode(keys, options["projection"], options["bias"])
    return torch.equal(expected, layer.codes[:, :, :length])


@pytest.fixture
def attached(tiny):
    with hata.hf.attach(tiny("llama"), selection=FEW), torch.no_grad():
        yield tiny("llama")


def filled(model, prompts, rows=2, tokens=20, steps=3):
    cache = DynamicCache(config=model.config)
    model(prompts.of(rows, tokens), **{CACHE: cache})
    for token in prompts.of(rows, steps).split(1, 1):
        model(token, **{CACHE: cache})
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
        attached(token, **{CACHE: cache})
        expected += 1
        assert all(layer.coded == expected for layer in cache.layers)
    assert all(map(in_step, cache.layers))


def test_fault_62_reset_forgets(attached, prompts):
    cache = filled(attached, prompts)
    cache.reset()
    assert all(layer.coded == 0 for layer in cache.layers)
    attached(prompts.of(2, 9), **{CACHE: cache})
    attached(prompts.of(2, 1), **{CACHE: cache})
    assert all(map(in_step, cache.layers))


def test_fault_62_static_cache(attached, prompts):
    cache = StaticCache(config=attached.config, max_cache_len=32)
    for rows, tokens in ((2, 11), (2, 1), (2, 1), (2, 4), (2, 1)):
        attached(prompts.of(rows, tokens), **{CACHE: cache})
    assert all(in_step(layer, 18) for layer in cache.layers)
    cache.reorder_cache(torch.tensor([1, 0]))
    attached(prompts.of(2, 1), **{CACHE: cache})
    assert all(in_step(layer, 19) for layer in cache.layers)
    cache.reset()
    attached(prompts.of(2, 5), **{CACHE: cache})
    attached(prompts.of(2, 1), **{CACHE: cache})
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
                model(prompts.of(1, tokens), **{CACHE: cache})
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
            model(ids, **{CACHE: cache})
            handle = handle or hata.hf.attach(model, selection=FEW)
            logits = [model(token, **{CACHE: cache}).logits for token in steps]
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
            model(prompts.of(2, 1), **{CACHE: cache})
    assert all(layer.codes.shape[-1] == 16 for layer in cache.layers)
    assert all(map(in_step, cache.layers))


def test_steps_do_not_copy_what_is_there(attached, prompts):
    cache = filled(attached, prompts)
    addresses = [(layer.keys.data_ptr(), layer.codes.data_ptr()) for layer in cache.layers]
    for token in prompts.of(2, 8).split(1, 1):
        attached(token, **{CACHE: cache})
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
    attached(prompts.of(2, 1), **{CACHE: cache})
    assert all(map(in_step, cache.layers))


def test_offload_and_prefetch(attached, prompts):
    cache = filled(attached, prompts)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    attached(prompts.of(2, 1), **{CACHE: cache})
    assert all(map(in_step, cache.layers))


REPLACED = {
    "every-second": lambda layer: (layer.keys[:, :, ::2], layer.values[:, :, ::2]),
    "evicted": lambda layer: (layer.keys[:, :, 5:], layer.values[:, :, 5:]),
    "another-order": lambda layer: (layer.keys.flip(2), layer.values.flip(2)),
}


@pytest.mark.parametrize("inference", [False, True], ids=["no-grad", "inference"])
@pytest.mark.parametrize("how", [*REPLACED, "written", "written-once-more"])
def test_keys_that_others_replace_or_write_are_encoded_anew(how, inference, tiny, prompts):
    """What compressors of caches do after a prefill, and between steps."""
    model = tiny("llama")
    with torch.inference_mode(inference), torch.no_grad(), hata.hf.attach(model, selection=FEW):
        cache = filled(model, prompts, rows=1, tokens=60)
        for layer in cache.layers:
            if how in REPLACED:
                layer.keys, layer.values = REPLACED[how](layer)
            else:
                layer.keys[:, :, 10:30] = layer.keys[:, :, 10:30].neg()
        if how == "written-once-more":
            model(prompts.of(1, 1), **{CACHE: cache})
            for layer in cache.layers:
                layer.keys.mul_(0.5).add_(0.25)
        fresh = DynamicCache([(one.keys.clone(), one.values.clone()) for one in cache.layers])
        place = torch.tensor([[70]])
        a, b = (
            model(prompts.of(1, 1), position_ids=place, **{CACHE: one}).logits
            for one in (cache, fresh)
        )
        assert all(map(in_step, cache.layers))
    assert torch.equal(a, b)


def test_keys_of_a_static_cache_that_others_write_are_encoded_anew(attached, prompts):
    cache = StaticCache(config=attached.config, max_cache_len=40)
    attached(prompts.of(1, 20), **{CACHE: cache})
    attached(prompts.of(1, 1), **{CACHE: cache})
    for layer in cache.layers:
        layer.keys[:, :, 3:9] = layer.keys[:, :, 3:9].neg()
    attached(prompts.of(1, 1), **{CACHE: cache})
    assert all(in_step(layer, 22) for layer in cache.layers)


KEPT = {
    "references": lambda cache: [(one.keys, one.values) for one in cache.layers],
    "a-part": lambda cache: [(one.keys[:, :1], one.values[:, :1]) for one in cache.layers],
    "shallow": lambda cache: [copy.copy(one) for one in cache.layers],
}
UNDONE = {
    "crop": lambda cache: cache.crop(-10),
    "reset": lambda cache: cache.reset(),
    "cut-by-hand": lambda cache: [
        vars(one).update(keys=one.keys[:, :, :-7], values=one.values[:, :, :-7])
        for one in cache.layers
    ],
}


@pytest.mark.parametrize("undo", UNDONE)
@pytest.mark.parametrize("keep", KEPT)
def test_a_saved_prefix_is_never_written_over(keep, undo, attached, prompts):
    """Back to a branch point and on in another way: what was saved of the first way stays."""
    cache = DynamicCache(config=attached.config)
    attached(prompts.of(1, 50), **{CACHE: cache})
    saved = [(one.keys, one.values) if hasattr(one, "keys") else one for one in KEPT[keep](cache)]
    before = [(keys.clone(), values.clone()) for keys, values in saved]
    UNDONE[undo](cache)
    for tokens in (10, 1, 1):
        attached(prompts.of(1, tokens), **{CACHE: cache})
    for (keys, values), (k, v) in zip(saved, before, strict=True):
        assert torch.equal(keys, k)
        assert torch.equal(values, v)
    assert all(map(in_step, cache.layers))


def test_rolling_back_what_nobody_holds_copies_nothing(attached, prompts):
    """As assisted decoding does at every step."""
    cache = filled(attached, prompts)
    addresses = [layer.keys.data_ptr() for layer in cache.layers]
    for _ in range(3):
        cache.crop(-2)
        attached(prompts.of(2, 3), **{CACHE: cache})
        attached(prompts.of(2, 1), **{CACHE: cache})
    assert addresses == [layer.keys.data_ptr() for layer in cache.layers]
    assert all(map(in_step, cache.layers))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_pickled_cache_is_one_of_transformers_and_goes_on(kind, attached, prompts, tmp_path):
    cache = DynamicCache(config=attached.config)
    if kind == "static":
        cache = StaticCache(config=attached.config, max_cache_len=40)
    for tokens in (20, 1, 1):
        attached(prompts.of(1, tokens), **{CACHE: cache})
    torch.save(cache, tmp_path / "cache.pt")
    # Keys and values, and a little around them: no room, no encoder.
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert (tmp_path / "cache.pt").stat().st_size < held + 8000
    loaded = torch.load(tmp_path / "cache.pt", weights_only=False)
    assert {type(layer).__module__ for layer in loaded.layers} == {"transformers.cache_utils"}
    steps = prompts.of(1, 3).split(1, 1)
    for token in steps:
        a, b = (attached(token, **{CACHE: one}).logits for one in (cache, loaded))
        assert torch.equal(a, b)


def test_a_deep_copy_keeps_its_codes(attached, prompts):
    cache = filled(attached, prompts)
    twin = copy.deepcopy(cache)
    assert all(layer.coded == 23 for layer in twin.layers)
    for token in prompts.of(2, 3).split(1, 1):
        a, b = (attached(token, **{CACHE: one}).logits for one in (cache, twin))
        assert torch.equal(a, b)
    twin.layers[1].keys.neg_()
    attached(prompts.of(2, 1), **{CACHE: twin})
    assert all(map(in_step, twin.layers))
    assert all(map(in_step, cache.layers))


@pytest.mark.parametrize("kind", [DynamicLayer, StaticLayer])
def test_all_that_a_layer_of_transformers_keeps_is_known(kind):
    """So that a layer that goes on in its place lacks nothing."""
    layer = kind() if kind is DynamicLayer else kind(max_cache_len=4)
    layer.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16))
    assert set(vars(layer)) <= set(DYNAMIC if kind is DynamicLayer else STATIC)
