"""Projections that share memory."""

import numpy as np
import pytest

import hata

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_views_that_begin_at_one_address_are_told_apart(dtype):
    """Keys' and queries' projections of one step: every other row, and the first half of them."""
    generator = torch.Generator().manual_seed(0)
    both, q, k, v = (
        torch.randn(size, generator=generator).to(getattr(torch, dtype))
        for size in ((1, 128, 64), (1, 4, 1, 64), (1, 1, 300, 64), (1, 1, 300, 64))
    )
    of_keys, of_queries = both[:, :64], both[:, ::2]
    with hata.use_backend("numba"):
        codes = hata.encode(k, of_keys)
        stale = codes.clone()
        stale[:, :, -64:] = 0
        got = hata.hash_attend(q, k, v, stale, of_keys, 16, query_projection=of_queries, fresh=64)
        q_codes = hata.encode(q, of_queries)
        expected = hata.hash_attend(q, k, v, codes, of_keys, 16, q_codes=q_codes)
    np.testing.assert_array_equal(stale.numpy(), codes.numpy())
    assert torch.equal(got, expected)
