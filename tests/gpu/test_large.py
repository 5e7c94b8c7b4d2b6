"""What needs a GPU and its memory: millions of keys that are all equal, and steps in graphs."""

import numpy as np
import pytest

import hata
from hata import registry

torch = pytest.importorskip("torch", reason="the GPU tests use torch")

pytestmark = pytest.mark.gpu
HEADS, KV_HEADS, BITS, BUDGET = 32, 8, 128, 2048


@pytest.fixture(params=["triton", "cupy"])
def backend(request):
    """Each backend for GPUs, in force; one that this machine is no match for is skipped."""
    absent = registry.missing(request.param)
    if absent is not None:
        pytest.skip(f"backend {request.param!r}: {absent}")
    with hata.use_backend(request.param):
        yield request.param


def codes(slots, value):
    return torch.full((1, KV_HEADS, slots, BITS // 8), value, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("slots", [2**20, 2**22])
@pytest.mark.parametrize("norms", [False, True], ids=["hamming", "norms"])
def test_fault_15_all_keys_equal(backend, slots, norms):
    """The lowest positions win, however many keys tie, and however many are visible."""
    q_codes = torch.full((1, HEADS, 1, BITS // 8), 0x3C, dtype=torch.uint8, device="cuda")
    key_codes = codes(slots, 0xA5)
    given = {}
    if norms:
        given["key_norms"] = torch.full((1, KV_HEADS, slots), 3.0, dtype=torch.float16).cuda()
    expected = torch.arange(BUDGET, dtype=torch.int32, device="cuda").expand(1, KV_HEADS, 1, -1)
    lengths = torch.tensor([slots], dtype=torch.int32, device="cuda")
    starts = torch.zeros(1, dtype=torch.int32, device="cuda")
    for first, last in ((0, slots), (0, slots - 77), (12345, slots - 1), (slots - 5000, slots)):
        lengths.fill_(last)
        starts.fill_(first)
        found = hata.hamming_topk(
            q_codes, key_codes, BUDGET, lengths=lengths, starts=starts, **given
        )
        assert torch.equal(found, expected + first)
    # Sinks and recent keys win beside the lowest positions.
    found = hata.hamming_topk(q_codes, key_codes, BUDGET, sink=4, recent=64, **given)
    assert torch.equal(found[..., :-64], expected[..., :-64])
    last = torch.arange(slots - 64, slots, dtype=torch.int32, device="cuda")
    assert torch.equal(found[..., -64:], last.expand(1, KV_HEADS, 1, -1))
    # One key that is nearer, at the very end.
    key_codes[:, :, -1] = 0x3C
    found = hata.hamming_topk(q_codes, key_codes, BUDGET, **given)
    assert torch.equal(found[..., :-1], expected[..., :-1])
    assert (found[..., -1] == slots - 1).all()


@pytest.mark.parametrize("slots", [2**20, 2**22])
def test_fault_15_a_step_over_equal_codes(backend, slots):
    """`hash_attend` takes the same keys: it equals attention to the lowest positions."""
    if torch.cuda.mem_get_info()[0] < 4 << 30:
        pytest.skip("needs 4 GiB of free memory on the device")
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator)

    q, projection = normal(1, HEADS, 1, 16), normal(KV_HEADS, 16, BITS)
    keys, values = normal(1, KV_HEADS, slots, 16), normal(1, KV_HEADS, slots, 16)
    positions = torch.arange(BUDGET, dtype=torch.int32, device="cuda")
    expected = hata.sparse_attend(
        q, keys, values, positions.expand(1, KV_HEADS, 1, -1).contiguous()
    )
    found = hata.hash_attend(q, keys, values, codes(slots, 0x5A), projection, BUDGET)
    np.testing.assert_allclose(
        found.float().cpu().numpy(), expected.float().cpu().numpy(), rtol=2e-2, atol=2e-2
    )


def test_fault_17_a_step_of_a_served_model_in_a_graph(backend):
    """100 replays at lengths that change, a batch of rows: the bits are those of eager calls."""
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator)

    batch, slots, size = 4, 32768, 128
    q, keys = normal(batch, HEADS, 1, size), normal(batch, KV_HEADS, slots, size)
    values, projection = normal(batch, KV_HEADS, slots, size), normal(KV_HEADS, size, BITS)
    key_codes = hata.encode(keys, projection)
    lengths = torch.full((batch,), slots, dtype=torch.int32, device="cuda")
    args = (q, keys, values, key_codes, projection, 512)
    options = {"fresh": 1, "lengths": lengths, "dense_below": 1024, "sink": 4, "recent": 32}
    hata.prepare("hash_attend", *args, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = hata.hash_attend(*args, **options, return_lse=True)
    steps = ((32768, 9, 4096, 1), (1000, 1025, 0, 20000), (31, 32768, 513, 512))
    seen = {}
    for turn in range(100):
        step = steps[turn % len(steps)]
        lengths.copy_(torch.tensor(step, dtype=torch.int32))
        graph.replay()
        bits = out.cpu().view(torch.int16).numpy().tobytes() + lse.cpu().numpy().tobytes()
        if step not in seen:
            eager = hata.hash_attend(*args, **options, return_lse=True)
            assert torch.equal(eager[0], out)
            assert torch.equal(eager[1], lse)
        assert seen.setdefault(step, bits) == bits
    assert torch.equal(hata.encode(keys, projection), key_codes), "codes were written that were not"


@pytest.mark.parametrize("norms", [False, True], ids=["hamming", "norms"])
def test_all_of_a_long_row(backend, norms):
    """Below `dense_below` all keys are taken, far more than a part of a row can score."""
    slots, size = 131072, 128
    generator = torch.Generator("cuda").manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator)

    q, keys, values = normal(1, HEADS, 1, size), *(normal(1, KV_HEADS, slots, size) for _ in "kv")
    projection, key_codes = normal(KV_HEADS, size, BITS), codes(slots, 0)
    given = {"fresh": 3, "dense_below": slots}
    if norms:
        given["key_norms"] = torch.zeros((1, KV_HEADS, slots), dtype=torch.float16, device="cuda")
    for length in (slots, 40_001):
        lengths = torch.tensor([length], dtype=torch.int32, device="cuda")
        out = hata.hash_attend(
            q, keys, values, key_codes, projection, 512, lengths=lengths, **given
        )
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(x[:, :, :length].float() for x in (q, keys, values)), enable_gqa=True
        )
        torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-3)
        fresh = slice(length - 3, length)
        assert torch.equal(key_codes[:, :, fresh], hata.encode(keys[:, :, fresh], projection))
        key_codes.zero_()


def test_a_cache_that_is_mostly_empty_is_not_read(backend):
    """131,072 slots of which 4,096 hold keys: what lies behind them is NaN and all ones."""
    slots, held = 131072, 4096
    generator = torch.Generator("cuda").manual_seed(2)
    keys, values = (
        torch.full((1, KV_HEADS, slots, 64), float("nan"), dtype=torch.float16, device="cuda")
        for _ in range(2)
    )
    for x in (keys, values):
        x[:, :, :held] = torch.randn((1, KV_HEADS, held, 64), device="cuda", generator=generator)
    q = torch.randn((1, HEADS, 1, 64), device="cuda", generator=generator).half()
    projection = torch.randn((KV_HEADS, 64, BITS), device="cuda", generator=generator).half()
    key_codes = codes(slots, 0xFF)
    key_codes[:, :, :held] = hata.encode(keys[:, :, :held], projection)
    lengths = torch.tensor(held, dtype=torch.int32, device="cuda")
    whole = hata.hash_attend(q, keys, values, key_codes, projection, 256, lengths=lengths)
    short = hata.hash_attend(
        q, *(x[:, :, :held] for x in (keys, values, key_codes)), projection, 256
    )
    assert torch.isfinite(whole).all()
    torch.testing.assert_close(whole, short, rtol=2e-3, atol=2e-3)
