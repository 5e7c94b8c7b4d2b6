"""The CPU kernels against the reference: odd shapes, ties everywhere, every keyword."""

import errno
import importlib
import itertools
import os
import re
import threading

import ml_dtypes
import numba
import numpy as np
import pytest

import hata
from hata.backend import use_config
from hata.call import HashAttend, visible
from hata.measure.tolerance import doubtful_bits

reference = importlib.import_module("hata.backends.reference")
schedule = importlib.import_module("hata.backends.numba.schedule")

DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
EPSILON = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}


@pytest.fixture(autouse=True)
def backend_in_force():
    with hata.use_backend("numba"):
        yield


def numbers(rng, *shape, dtype="fp32"):
    return rng.standard_normal(shape, np.float32).astype(DTYPES[dtype])


def random_codes(rng, *shape, few=False):
    codes = rng.integers(0, 256, shape, np.uint8)
    # few different codes: ties everywhere
    return codes & 1 if few else codes


def assert_codes(codes, x, projection, bias=None):
    expected = reference.encode(x, projection, bias)
    bits, right = (np.unpackbits(c, axis=-1, bitorder="little") for c in (codes, expected))
    sure = ~doubtful_bits(x, projection, bias)
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(bits[sure], right[sure])


def exact_norms(x):
    norms = np.zeros(x.shape[:3], np.float16)
    reference.encode(x, np.zeros((1, x.shape[3], 32)), norms=norms)
    return norms


def strided(x):
    """The same values with gaps between rows and heads, from an odd address."""
    hold = np.zeros((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1] + 3), x.dtype)
    view = hold[..., 1:, 1 : 1 + x.shape[-1]]
    view[...] = x
    return view


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("depth", "bits"), [(16, 32), (80, 96), (128, 128), (576, 160)])
def test_encode(dtype, depth, bits):
    rng = np.random.default_rng(depth)
    for projection_dtype in {dtype, "fp32"}:
        x = numbers(rng, 2, 6, 7, depth, dtype=dtype)
        projection = numbers(rng, 3, depth, bits, dtype=projection_dtype)
        bias = numbers(rng, 3, bits, dtype="fp32")
        norms = np.full((2, 6, 7), np.nan, np.float16)
        codes = hata.encode(x, projection, bias, norms=norms)
        assert_codes(codes, x, projection, bias)
        np.testing.assert_allclose(norms, exact_norms(x), rtol=2.0**-10)
        # a vector's code depends on that vector alone
        np.testing.assert_array_equal(hata.encode(strided(x), projection, bias), codes)
        np.testing.assert_array_equal(hata.encode(x[:, :, 4:5], projection, bias), codes[:, :, 4:5])


def test_encode_signs_and_norms():
    x = np.zeros((1, 1, 5, 16), np.float32)
    x[0, 0, 1, 0], x[0, 0, 2, 0], x[0, 0, 3, 0], x[0, 0, 4, 0] = np.nan, 1e30, -1, 3e-8
    projection = np.eye(16, 32, dtype=np.float32)[None]
    norms = np.empty((1, 1, 5), np.float16)
    codes = hata.encode(x, projection, norms=norms)
    assert codes[0, 0, :, 0].tolist() == [0, 0, 1, 0, 1]
    np.testing.assert_array_equal(norms[0, 0], np.float16([0, 0, 65504, 1, 3e-8]))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12, 16])
@pytest.mark.parametrize("bits", [32, 64, 96, 128, 160, 256, 512])
def test_distances_are_exact(group, bits):
    rng = np.random.default_rng(group * bits)
    q_codes, k_codes = (
        random_codes(rng, 1, group, 1, bits // 8),
        random_codes(rng, 1, 1, 333, bits // 8),
    )
    expected = reference.hamming_topk(q_codes, k_codes, 40)
    for variant in ("direct", "planes"):
        with use_config(
            "numba", "hamming_topk", {"threads": "one", "variant": variant, "chunk": 1024}
        ):
            np.testing.assert_array_equal(hata.hamming_topk(q_codes, k_codes, 40), expected)


@pytest.mark.parametrize("seed", range(40))
def test_hamming_topk(seed):
    rng = np.random.default_rng(seed)
    batch, kv_heads, tokens = rng.integers(1, 4, 3)
    group, bits = rng.choice([1, 2, 3, 4, 7, 16]), 32 * int(rng.choice([1, 2, 3, 4, 5, 8, 16]))
    slots, few = int(rng.choice([1, 63, 64, 65, 500, 3000])), bool(rng.integers(2))
    q_codes = random_codes(rng, batch, group * kv_heads, tokens, bits // 8, few=few)
    k_codes = random_codes(rng, batch, kv_heads, slots, bits // 8, few=few)
    k = int(rng.choice([1, 5, 64, 700]))
    sink = int(rng.integers(0, min(k, 9) + 1))
    recent = int(rng.integers(0, min(k - sink, 9) + 1))
    options = {"sink": sink, "recent": recent, "per_head": bool(rng.integers(2))}
    if rng.integers(3):
        options["lengths"] = rng.integers(-2, slots + 9, batch).astype(rng.choice(["i4", "i8"]))
    if rng.integers(2):
        options["starts"] = rng.integers(-3, slots, batch).astype(rng.choice(["i4", "i8"]))
    if rng.integers(2):
        options |= {"ratio": float(rng.choice([0.01, 0.3, 1.0])), "k_min": int(rng.integers(0, 9))}
    if rng.integers(2):
        norms = rng.choice([0, 1, 1.5, 6e-8, 65504, np.inf, np.nan, -1], (batch, kv_heads, slots))
        options["key_norms"] = norms.astype(np.float16)
    expected = reference.hamming_topk(q_codes, k_codes, k, **options)
    for variant, chunk, threads in [("planes", 8192, "all"), ("direct", 1024, "one")]:
        config = {"threads": threads, "variant": variant, "chunk": chunk}
        with use_config("numba", "hamming_topk", config):
            np.testing.assert_array_equal(
                hata.hamming_topk(q_codes, k_codes, k, **options), expected
            )
            got = hata.hamming_topk(strided(q_codes), strided(k_codes), k, **options)
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("wide", [False, True], ids=["counts", "norms"])
def test_all_keys_equal_take_the_lowest(wide):
    codes = np.zeros((1, 2, 70_000, 16), np.uint8)
    norms = np.ones((1, 2, 70_000), np.float16) if wide else None
    indices = hata.hamming_topk(codes[:, :, :1], codes, 40_000, key_norms=norms)
    assert (indices == np.arange(40_000)).all()


def test_sums_beyond_16_bits():
    rng = np.random.default_rng(0)
    q_codes, k_codes = random_codes(rng, 1, 130, 1, 64), random_codes(rng, 1, 1, 300, 64)
    k_codes[0, 0, 7], q_codes[:] = 255, 0
    np.testing.assert_array_equal(
        hata.hamming_topk(q_codes, k_codes, 50), reference.hamming_topk(q_codes, k_codes, 50)
    )


def assert_attention(got, expected, values, dtype, heads):
    out, lse = got
    limit = np.nanmax(np.abs(values.astype(np.float64)), initial=0.0)
    tolerance = limit * (EPSILON[dtype] / 2 + 1e-6)
    np.testing.assert_allclose(out.astype(np.float64), expected[0], atol=tolerance, rtol=0)
    np.testing.assert_allclose(lse, expected[1], atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("seed", range(30))
def test_sparse_attend(seed):
    rng = np.random.default_rng(seed)
    dtype = list(DTYPES)[seed % 3]
    batch, kv_heads, tokens = rng.integers(1, 4, 3)
    group, depth = int(rng.choice([1, 3, 4, 7, 16])), int(rng.choice([16, 80, 128, 576]))
    value_depth, slots = int(rng.choice([16, 64, 144])), int(rng.choice([1, 30, 900]))
    heads, k = kv_heads * group, int(rng.choice([1, 3, 64, 333]))
    q = numbers(rng, batch, heads, tokens, depth, dtype=dtype)
    keys = numbers(rng, batch, kv_heads, slots, depth, dtype=dtype)
    values = numbers(rng, batch, kv_heads, slots, value_depth, dtype=dtype)
    index_heads = heads if rng.integers(2) else kv_heads
    indices = rng.integers(-3, slots + 2, (batch, index_heads, tokens, k)).astype(np.int32)
    options = {"return_lse": True}
    if rng.integers(2):
        options["softcap"] = 5.0
    if rng.integers(2):
        options["scale"] = 0.3
    if rng.integers(2):
        options["sink_logits"] = numbers(rng, heads, dtype=str(rng.choice([dtype, "fp32"])))
    expected = reference.sparse_attend(q, keys, values, indices, **options)
    got = hata.sparse_attend(q, keys, values, indices, **options)
    assert_attention(got, expected, values, dtype, heads)
    again = hata.sparse_attend(
        strided(q), strided(keys), strided(values), strided(indices), **options
    )
    np.testing.assert_array_equal(got[0], again[0])
    # a row's bits depend on that row alone
    with use_config("numba", "sparse_attend", {"threads": "one", "tile": 256}):
        narrow = hata.sparse_attend(
            q[:1, :, -1:], keys[:1], values[:1], indices[:1, :, -1:], **options
        )
    np.testing.assert_array_equal(narrow[0], got[0][:1, :, -1:])


def test_nan_stays_in_its_row():
    rng = np.random.default_rng(0)
    q, keys, values = (numbers(rng, 1, 2, 40, 32) for _ in range(3))
    indices = np.arange(20, dtype=np.int32).reshape(1, 1, 1, 20) * np.ones((1, 2, 40, 1), np.int32)
    clean = hata.sparse_attend(q, keys, values, indices)
    keys[:, :, 25:], values[:, :, 25:] = np.nan, np.nan
    np.testing.assert_array_equal(hata.sparse_attend(q, keys, values, indices), clean)
    q[0, 1, 3, 5] = np.nan
    out = hata.sparse_attend(q, keys, values, indices)
    assert np.isnan(out[0, 1, 3]).all()
    assert np.isnan(out).sum() == 32


def test_infinite_keys_weigh_what_softmax_gives_them():
    q, values = np.ones((1, 1, 1, 16), np.float32), np.ones((1, 1, 600, 16), np.float32)
    keys = np.zeros((1, 1, 600, 16), np.float32)
    keys[:, :, :300] = -np.inf
    indices = np.arange(600, dtype=np.int32)[None, None, None]
    out, lse = hata.sparse_attend(q, keys, values, indices, return_lse=True)
    np.testing.assert_array_equal(out, 1)
    np.testing.assert_allclose(lse, np.log(300), rtol=1e-6)
    out, lse = hata.sparse_attend(q, keys, values, indices[..., :300], return_lse=True)
    assert np.isnan(out).all()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("seed", range(30))
def test_hash_attend(seed):
    rng = np.random.default_rng(seed)
    dtype = list(DTYPES)[seed % 3]
    batch, kv_heads, tokens = rng.integers(1, 4, 3)
    group, depth, bits = int(rng.choice([1, 3, 4, 7])), 48, int(rng.choice([32, 128, 160]))
    slots = int(rng.choice([1, 90, 2000]))
    heads, k = kv_heads * group, int(rng.choice([3, 64, 5000]))
    q = numbers(rng, batch, heads, tokens, depth, dtype=dtype)
    keys = numbers(rng, batch, kv_heads, slots, depth, dtype=dtype)
    values = numbers(rng, batch, kv_heads, slots, 64, dtype=dtype)
    projection = numbers(rng, kv_heads, depth, bits, dtype=str(rng.choice([dtype, "fp32"])))
    options = {"fresh": int(rng.choice([0, 1, 5, 200])), "dense_below": int(rng.choice([0, 70]))}
    options |= {"sink": int(rng.integers(0, 2)), "recent": int(rng.integers(0, 2))}
    if rng.integers(2):
        options["lengths"] = rng.integers(0, slots + 1, batch)
    if rng.integers(2):
        options["starts"] = rng.integers(0, slots, batch).astype(np.int32)
    if rng.integers(2):
        options["bias"] = numbers(rng, kv_heads, bits)
    if rng.integers(2):
        options["query_projection"] = numbers(rng, kv_heads, depth, bits)
    if rng.integers(2):
        options["query_bias"] = numbers(rng, kv_heads, bits)
    if rng.integers(2):
        options["ratio"] = 0.05
    codes = np.full((batch, kv_heads, slots, bits // 8), 90, np.uint8)
    fresh = options["fresh"]
    norms = numbers(rng, batch, kv_heads, slots, dtype="fp16") if rng.integers(2) else None
    # the reference starts from our codes, for bits on the margin may differ
    written = hata.encode(keys, projection, options.get("bias"))
    bounds = {name: options.get(name) for name in ("lengths", "starts")}
    spans = list(visible(HashAttend(q, keys, values, codes, projection, **bounds)))
    last = [(b, low, high) for b, t, low, high in spans if t == tokens - 1]
    written_codes = codes.copy()
    for b, low, high in last:
        written_codes[b, :, max(low, high - fresh) : high] = written[
            b, :, max(low, high - fresh) : high
        ]
    side = options.get("query_projection", projection)
    bias = options.get("query_bias", options.get("bias"))
    q_codes = hata.encode(q, side, bias)
    norms_expected = None if norms is None else norms.copy()
    got = hata.hash_attend(
        q, keys, values, codes, projection, k, key_norms=norms, return_lse=True, **options
    )
    np.testing.assert_array_equal(codes, written_codes)
    if norms is not None:
        exact = exact_norms(keys)
        for b, low, high in last:
            at = slice(max(low, high - fresh), high)
            np.testing.assert_allclose(norms[b, :, at], exact[b, :, at], rtol=2.0**-10)
            norms_expected[b, :, at] = norms[b, :, at]
        np.testing.assert_array_equal(norms, norms_expected)
    plain = {name: value for name, value in options.items() if name != "fresh"}
    budget = {name: plain[name] for name in ("sink", "recent", "ratio") if name in plain}
    indices = reference.hamming_topk(q_codes, codes, k, key_norms=norms, **bounds, **budget)
    indices = np.concatenate([indices, np.full((*indices.shape[:3], 70), -1, np.int32)], axis=3)
    for b, t, low, high in spans:
        if high - low <= options["dense_below"]:
            indices[b, :, t] = -1
            indices[b, :, t, : high - low] = np.arange(low, high)
    expected = reference.sparse_attend(q, keys, values, indices, return_lse=True)
    assert_attention(got, expected, values, dtype, heads)
    given = hata.hash_attend(
        q,
        keys,
        values,
        codes,
        projection,
        k,
        q_codes=q_codes,
        key_norms=norms,
        return_lse=True,
        **plain,
    )
    np.testing.assert_array_equal(given[0], got[0])


def test_two_threads_at_once():
    rng = np.random.default_rng(0)
    q_codes, k_codes = random_codes(rng, 2, 8, 1, 16), random_codes(rng, 2, 2, 20_000, 16)
    expected = hata.hamming_topk(q_codes, k_codes, 300)
    wrong = []

    def work():
        for _ in range(30):
            with hata.use_backend("numba"):
                if not np.array_equal(hata.hamming_topk(q_codes, k_codes, 300), expected):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(("op", "knobs"), [
    ("hamming_topk", {"chunk": (1024, 4096), "variant": ("direct", "planes")}),
    ("hash_attend", {"tile": (64, 1024), "chunk": (1024, 32768)}),
])  # fmt: skip
def test_knobs_change_nothing_but_speed(op, knobs):
    rng = np.random.default_rng(0)
    keys, q = numbers(rng, 1, 2, 6000, 64), numbers(rng, 1, 8, 2, 64)
    projection = numbers(rng, 2, 64, 128)
    codes, q_codes = hata.encode(keys, projection), hata.encode(q, projection)

    def run():
        if op == "hamming_topk":
            return hata.hamming_topk(q_codes, codes, 500)
        return hata.hash_attend(q, keys, keys, codes, projection, 500)

    expected = run()
    base = dict(importlib.import_module(f"hata.backends.numba.{op}").DEFAULTS)
    for values in itertools.product(*knobs.values(), ("one", "all")):
        config = base | dict(zip([*knobs, "threads"], values, strict=True))
        with use_config("numba", op, config):
            np.testing.assert_allclose(run(), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["lengths", "starts"])
@pytest.mark.parametrize("value", [-(2**63), -(2**63) + 2, -(2**31), -1, 2**31, 2**63 - 1])
def test_garbage_in_bounds_touches_no_other_row(name, value):
    rng = np.random.default_rng(3)
    q, keys = numbers(rng, 2, 4, 2, 32), numbers(rng, 2, 2, 64, 32)
    projection, codes = numbers(rng, 2, 32, 64), np.zeros((2, 2, 64, 8), np.uint8)
    bounds = np.int64([64, 64] if name == "lengths" else [0, 0])
    expected = codes.copy()
    right = hata.hash_attend(q, keys, keys, expected, projection, 8, fresh=3, **{name: bounds})
    bounds[1] = value
    out = hata.hash_attend(q, keys, keys, codes, projection, 8, fresh=3, **{name: bounds})
    whole = value < 0 if name == "starts" else value > 0
    np.testing.assert_array_equal(out, right if whole else [right[0], np.zeros_like(right[1])])
    np.testing.assert_array_equal(codes[0], expected[0])
    assert codes[1].any() == whole


# numba's cache on disk.

DAMAGE = {
    "empty index": ("*.nbi", lambda data: b""),
    "half an index": ("*.nbi", lambda data: data[: len(data) // 2]),
    "empty code": ("*.nbc", lambda data: b""),
    "half the code": ("*.nbc", lambda data: data[: len(data) // 2]),
    "zeros for code": ("*.nbc", lambda data: bytes(len(data))),
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, of which nothing was said yet."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(schedule, "_warned", set())
    return tmp_path


def small_kernels():
    """Compile or load two kernels that compile fast; how many of them were loaded."""
    made = (
        schedule._compiled(schedule._make_helper(schedule.REVISION), numba.int64),
        schedule._compiled(schedule._make_lead(schedule.REVISION), *(numba.int64,) * 5),
    )
    assert all(kernel.address for kernel in made)
    return sum(kernel.cache_hits for kernel in made)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_caches_are_made_anew(cache, damage):
    assert small_kernels() == 0
    assert small_kernels() == 2
    kind, spoil = DAMAGE[damage]
    damaged = sorted(cache.rglob(kind))
    assert len(damaged) == 2
    stranger = damaged[0].with_name("stranger" + damaged[0].name)
    for file in (*damaged, stranger):
        file.write_bytes(spoil(damaged[0].read_bytes()))
    kept = stranger.read_bytes()
    folder = re.escape(str(damaged[0].parent))
    with pytest.warns(RuntimeWarning, match=f"numba's cache folder {folder}") as said:
        assert small_kernels() == 0
    assert len(said) == 1
    assert small_kernels() == 2
    assert stranger.read_bytes() == kept


@pytest.mark.parametrize("damaged", [False, True])
def test_caches_that_cannot_be_written_are_done_without(cache, damaged, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if damaged:
        small_kernels()
        for file in cache.rglob("*.nbi"):
            file.write_bytes(b"")
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.warns(RuntimeWarning, match="cannot be written") as said:
        assert small_kernels() == 0
    assert len(said) == 1
    # It is said once in a process.
    assert small_kernels() == 0


def test_no_folder_for_a_cache_at_all(cache, monkeypatch):
    nowhere = cache / "file"
    nowhere.write_text("")
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(nowhere))
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", "UserProvidedCacheLocator")
    assert small_kernels() == 0
    assert small_kernels() == 0
