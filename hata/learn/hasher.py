"""`Hasher`: our encoder of one layer, as a torch module.

A key's code is the signs of `k W + c`. A query head gets `codes` codes, each with a projection and
thresholds of its own; what a key scores is the agreement summed over all codes of a group, so every
bit of a key counts with a weight of `G * codes + 1` levels that depends on the query. Keys stay at
one bit a bit, which is what is stored and scanned; queries are few, so theirs may be finer.

Training starts from projections that keep the products: `q` and `k` are turned and scaled such that
their second moments agree and `q.k` stays what it is; random directions of that space make codes
whose agreement estimates the product, evenly for all its parts. Keys are centred: their mean adds
the same to all scores of a query, which softmax does not see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hata.encoder.layer import LayerHash, QueryHash
from hata.learn.recipe import exported

Sign = Callable[[torch.Tensor], torch.Tensor]


def hard_sign(x: torch.Tensor) -> torch.Tensor:
    """The bits of `hata.encode`, as 1 and -1."""
    return torch.where(x > 0, 1.0, -1.0)


def soft_sign(sharpness: float) -> Sign:
    """`tanh(sharpness * x)`."""
    return lambda x: torch.tanh(x * sharpness)


def straight_through(sharpness: float) -> Sign:
    """The signs themselves, whose gradient is that of `tanh(sharpness * x)`."""
    return lambda x: _StraightThrough.apply(x, sharpness)  # type: ignore[no-any-return]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sharpness: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.sharpness = sharpness
        return hard_sign(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        soft = torch.tanh(x * ctx.sharpness)
        return grads[0] * (1 - soft * soft) * ctx.sharpness, None


class Hasher(nn.Module):
    """Codes of the N KV heads of a layer.

    Args:
        q: Queries to start from, `[N, n, D]`.
        keys: Keys to start from, `[N, n, D]`.
        group: Query heads per KV head, G.
        bits: Bits of a code, r.
        codes: Codes per query head.
        generator: Source of the random directions; on the CPU, so that every device starts alike.
    """

    def __init__(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        *,
        group: int,
        bits: int,
        codes: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        heads, _, size = keys.shape
        mean = keys.mean(1, keepdim=True)
        # Weights are trained in units of their inputs, so that one learning rate fits all models.
        self.q_unit = q.square().mean((1, 2)).sqrt()[:, None, None]  # [N, 1, 1]
        self.k_unit = (keys - mean).square().mean((1, 2)).sqrt()[:, None, None]
        self.mean = mean / self.k_unit  # [N, 1, D]
        q, keys = q / self.q_unit, keys / self.k_unit - self.mean
        to_q, to_k = _balanced(q, keys)
        turns = _directions(heads, size, bits, generator).to(keys)
        w, v = to_k @ turns, to_q @ turns  # [N, D, r]
        w = w / (keys @ w).std(1, keepdim=True)
        v = v / (q @ v).std(1, keepdim=True)
        # Thresholds spread over what a projected query takes, so that its codes differ.
        edges = torch.linspace(-1.5, 1.5, codes + 2)[1:-1] if codes > 1 else torch.zeros(1)
        self.w = nn.Parameter(w)
        self.c = nn.Parameter(torch.zeros_like(w[:, :1]))
        self.v = nn.Parameter(v[:, None, None].repeat(1, group, codes, 1, 1))
        self.d = nn.Parameter(edges.to(w).view(1, 1, -1, 1, 1).repeat(heads, group, 1, 1, bits))

    def encode_keys(self, keys: torch.Tensor, sign: Sign) -> torch.Tensor:
        """`[N, S, D]` -> `[N, S, r]`."""
        # Units and the mean go to the weights, of which there are fewer.
        offset = self.c - self.mean @ self.w
        return sign(keys @ (self.w / self.k_unit) + offset)

    def encode_queries(self, q: torch.Tensor, sign: Sign) -> torch.Tensor:
        """`[N, G, Q, D]` -> `[N, Q, r]`: the mean of a group's codes, in steps of 2 / (G codes)."""
        x = (q / self.q_unit[..., None]).unsqueeze(2)
        return sign(x @ self.v + self.d).mean((1, 2))

    def export(self) -> LayerHash:
        """The layer as an encoder holds it: units and the mean folded into weights and biases."""
        with torch.no_grad():
            projection = exported(self.w / self.k_unit)
            # The bias belongs to the rounded projection: the mean may be large.
            rounded = torch.from_numpy(projection).to(self.w)
            bias = exported((self.c - (self.mean * self.k_unit) @ rounded).squeeze(1))
            v, d = self.v / self.q_unit[..., None, None], self.d.squeeze(3)
            query = QueryHash(exported(v.flatten(0, 2)), exported(d.flatten(0, 2)))
        return LayerHash(projection, bias, query)


def _balanced(q: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps `[N, D, D]` of q and k that keep their products and give both one second moment."""
    q_root, q_inverse = _roots(q.mT @ q / q.shape[1])
    k_root, k_inverse = _roots(keys.mT @ keys / keys.shape[1])
    left, values, right = torch.linalg.svd(q_root @ k_root)
    spread = torch.diag_embed(values.sqrt())
    return q_inverse @ left @ spread, k_inverse @ right.mT @ spread


def _roots(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The square root of a symmetric matrix, and its inverse; what is nearly 0 is raised."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(1e-5 * float(values.max()))
    root, inverse = (torch.diag_embed(values**power) for power in (0.5, -0.5))
    return vectors @ root @ vectors.mT, vectors @ inverse @ vectors.mT


def _directions(heads: int, size: int, bits: int, generator: torch.Generator) -> torch.Tensor:
    """Random directions `[heads, size, bits]`, orthogonal within every block of `size`."""
    blocks = -(-bits // size)
    normal = torch.randn(heads, blocks, size, size, generator=generator)
    return torch.linalg.qr(normal).Q.movedim(1, 2).flatten(2)[..., :bits]
