"""The callables that are timed, in a table of builders for each family.

A builder makes a `Contender` of a `Case`. Another dense kernel is one more function in a table.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import hata
from benchmarks.shapes import Shape

# Tokens that are encoded at once when a cache is filled.
_CHUNK = 16_384


class Case(NamedTuple):
    """The arrays of one decode step of one layer: a cache that holds `keys` of `slots` slots.

    The last visible key is fresh: it is in the cache and its code is not. Slots behind the visible
    keys hold NaN, so that a kernel that reads one is found out.
    """

    shape: Shape
    q: Tensor  # [B, H, 1, D]
    keys: Tensor  # [B, Hkv, S, D]
    values: Tensor  # [B, Hkv, S, D]
    codes: Tensor  # [B, Hkv, S, r/8]
    projection: Tensor  # [Hkv, D, r]
    lengths: Tensor  # [B]
    q_codes: Tensor  # [B, H, 1, r/8]
    indices: Tensor  # [B, Hkv, 1, k]

    @property
    def visible(self) -> tuple[Tensor, Tensor]:
        """Keys and values without the empty slots, as dense attention takes them."""
        n = self.shape.keys
        return self.keys[:, :, :n], self.values[:, :, :n]


def build(shape: Shape, device: str, seed: int = 0) -> Case:
    """Fill a cache with normal vectors and encode its keys with the backend in force."""
    dtype = getattr(torch, shape.dtype)
    generator = torch.Generator(device).manual_seed(seed)
    b, h, d, n = shape.batch, shape.kv_heads, shape.head_dim, shape.keys

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype, device=device)

    def cache() -> Tensor:
        x = torch.empty((b, h, shape.s, d), dtype=dtype, device=device)
        x[:, :, :n].normal_(generator=generator)
        x[:, :, n:] = torch.nan
        return x

    config = {
        "num_hidden_layers": 1, "num_attention_heads": shape.heads, "num_key_value_heads": h,
        "head_dim": d,
    }  # fmt: skip
    projection = torch.from_numpy(hata.Encoder.random(config, shape.bits, seed).projection(0))
    projection = projection.to(device, dtype).contiguous()
    q, keys, values = normal(b, shape.heads, 1, d), cache(), cache()
    codes = torch.zeros((b, h, shape.s, shape.bits // 8), dtype=torch.uint8, device=device)
    for start in range(0, n, _CHUNK):
        part = slice(start, min(start + _CHUNK, n))
        codes[:, :, part] = hata.encode(keys[:, :, part], projection)
    lengths = torch.full((b,), n, dtype=torch.int32, device=device)
    q_codes = hata.encode(q, projection)
    indices = hata.hamming_topk(q_codes, codes, shape.k, lengths=lengths)
    return Case(shape, q, keys, values, codes, projection, lengths, q_codes, indices)


class Contender(NamedTuple):
    """Something to time, of the family `"op"`, `"dense"` or `"read"`; it moves `bytes` at least."""

    name: str
    family: str
    call: Callable[[], Tensor]
    bytes: int


def encode(case: Case) -> Contender:
    """Hash what a step brings: its queries and its fresh keys."""
    codes, q_codes = torch.empty_like(case.codes[:, :, :1]), case.q_codes.clone()
    fresh = case.keys[:, :, case.shape.keys - 1 : case.shape.keys]

    def call() -> Tensor:
        hata.encode(fresh, case.projection, out=codes)
        return hata.encode(case.q, case.projection, out=q_codes)

    return Contender("encode", "op", call, case.shape.encode_bytes)


def hamming_topk(case: Case) -> Contender:
    """Scan the codes and select."""
    given = case.q_codes, case.codes, case.shape.k
    call = partial(hata.hamming_topk, *given, lengths=case.lengths)
    return Contender("hamming_topk", "op", call, case.shape.code_bytes)


def sparse_attend(case: Case) -> Contender:
    """Attend to the selected keys."""
    call = partial(hata.sparse_attend, case.q, case.keys, case.values, case.indices)
    return Contender("sparse_attend", "op", call, case.shape.gather_bytes)


def hash_attend(case: Case) -> Contender:
    """The whole step, the fresh key's code included."""
    arrays = case.q, case.keys, case.values, case.codes, case.projection
    call = partial(hata.hash_attend, *arrays, case.shape.k, fresh=1, lengths=case.lengths)
    return Contender("hash_attend", "op", call, case.shape.step_bytes)


def sdpa_gqa(case: Case, name: str = "sdpa enable_gqa", kernel: Any = None) -> Contender:
    """Torch SDPA that is told of the groups; with a kernel of torch's choice, or a given one."""
    q, (keys, values) = case.q, case.visible

    def call() -> Tensor:
        with contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel):
            return sdpa(q, keys, values, enable_gqa=True)

    return Contender(name, "dense", call, case.shape.dense_bytes)


def sdpa_packed(case: Case) -> Contender:
    """Torch SDPA with the queries of a group as tokens, so that a key is read once for a group."""
    q, (keys, values) = case.q, case.visible
    packed = q.view(q.shape[0], case.shape.kv_heads, -1, q.shape[3])

    def call() -> Tensor:
        return sdpa(packed, keys, values).view(q.shape)

    return Contender("sdpa packed", "dense", call, case.shape.dense_bytes)


def flashinfer(case: Case) -> Contender:
    """FlashInfer's decode kernel, a row at a time (its plain entry point takes one)."""
    decode = importlib.import_module("flashinfer").single_decode_with_kv_cache
    decode = partial(decode, kv_layout="HND", use_tensor_cores=True)
    q, (keys, values) = case.q[:, :, 0], case.visible

    def call() -> Tensor:
        return torch.stack(list(map(decode, q, keys, values)))[:, :, None]

    return Contender("flashinfer", "dense", call, case.shape.dense_bytes)


def read(case: Case, name: str, size_of: Callable[[Shape], int]) -> Contender:
    """A read-only pass over as many contiguous bytes: what memory allows at best."""
    size, device = size_of(case.shape), case.q.device.type
    if device == "cuda":
        # It needs Triton.
        return Contender(name, "read", importlib.import_module("benchmarks.gpu").reader(size), size)
    words = torch.ones(max(size // 4, 1), dtype=torch.float32, device=device)
    return Contender(name, "read", words.sum, size)


Builder = Callable[[Case], Contender]

OPS: dict[str, Builder] = {
    make.__name__: make for make in (encode, hamming_topk, sparse_attend, hash_attend)
}
# The dense contenders of each kind of device; the fastest is what the ratio is taken against.
DENSE: dict[str, dict[str, Builder]] = {
    "cpu": {"sdpa enable_gqa": sdpa_gqa, "sdpa packed": sdpa_packed},
    "cuda": {
        name: partial(sdpa_gqa, name=name, kernel=kernel)
        for name, kernel in (
            ("sdpa cudnn", SDPBackend.CUDNN_ATTENTION),
            ("sdpa flash", SDPBackend.FLASH_ATTENTION),
        )
    },
}
if importlib.util.find_spec("flashinfer") is not None:
    DENSE["cuda"]["flashinfer"] = flashinfer
# As many bytes as the scan reads, and as a step of hash attention moves.
READS: dict[str, Builder] = {
    "read codes": partial(read, name="read codes", size_of=attrgetter("code_bytes")),
    "read step": partial(read, name="read step", size_of=attrgetter("step_bytes")),
}
