"""What a hash is trained for, as torch functions of its scores.

Ours are listwise: a row is one query of a GQA group, its entries are the keys it sees, and the
target is the share of attention mass that each key gets from the group's heads together. `listwise`
is the cross-entropy against that share; `kept_mass` is the share that the best keys hold, smoothed
at the budget's edge, so that a step moves the keys that are about to enter or to leave.

The other two are baselines: `pairwise` is HATA's (arXiv 2506.02572), `matching` HashAttention's
(arXiv 2412.14468).
"""

from __future__ import annotations

from typing import Any

import torch

LOWEST = -1e30
# Shares below exp(-FAINT) are raised to it: a step does not see them, and products of smaller
# numbers are denormal, over which CPUs take a hundred times as long.
FAINT = 40.0


def group_target(
    q: torch.Tensor, keys: torch.Tensor, scale: float, hidden: torch.Tensor
) -> torch.Tensor:
    """Share of a group's attention mass on each key.

    Args:
        q: `[N, G, Q, D]`, N KV heads.
        keys: `[N, S, D]`.
        scale: Factor of the logits.
        hidden: `[Q, S]`, true where a query does not see a key.

    Returns:
        `[N, Q, S]`; a row adds up to 1.
    """
    heads, group, queries, size = q.shape
    logits = (q.reshape(heads, group * queries, size) * scale) @ keys.mT
    logits = logits.unflatten(1, (group, queries)).masked_fill_(hidden, LOWEST)
    logits = logits.sub_(logits.amax(-1, keepdim=True)).clamp_min_(-FAINT)
    return logits.masked_fill_(hidden, LOWEST).softmax(-1).mean(1)


def listwise(scores: torch.Tensor, target: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of softmax(scores) against the target, `[N, Q, S]` -> a mean over rows."""
    # What is hidden has a target of 0, and LOWEST is finite.
    return -(target * scores.masked_fill(hidden, LOWEST).log_softmax(-1)).sum(-1).mean()


def kept_mass(
    scores: torch.Tensor,
    target: torch.Tensor,
    hidden: torch.Tensor,
    budgets: torch.Tensor,
    width: float,
) -> torch.Tensor:
    """Target mass on the best `budgets` keys of each row, smoothed: a mean over rows, to maximise.

    A key counts sigmoid((score - edge) / width), `edge` being the score of the last key within the
    budget. The edge moves with the scores such that the counts keep their sum, so a key gains only
    as far as it holds more mass than its rivals at the edge.

    Args:
        scores: `[N, Q, S]`.
        target: `[N, Q, S]`.
        hidden: `[Q, S]`.
        budgets: `[Q]` int64, in keys, on the CPU.
        width: Softness of the edge, in units of the scores.
    """
    return _KeptMass.apply(scores, target, hidden, budgets, width)  # type: ignore[no-any-return]


class _KeptMass(torch.autograd.Function):
    """`kept_mass`, whose gradient falls off while it is computed: these passes are what costs."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: torch.Tensor,
        target: torch.Tensor,
        hidden: torch.Tensor,
        budgets: torch.Tensor,
        width: float,
    ) -> torch.Tensor:
        seen = scores.masked_fill(hidden, LOWEST)
        best = seen.topk(int(budgets.max()), -1).values
        last = (budgets - 1).to(scores.device, non_blocking=True)
        edge = best.gather(2, last.expand(len(scores), -1).unsqueeze(-1))
        count = seen.sub_(edge).mul_(1 / width).clamp_(-FAINT, FAINT).sigmoid_()
        kept = (target * count).sum(-1).mean()
        slope = count.addcmul_(count, count, value=-1)
        rival = (slope * target).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True).clamp_min(1e-6)
        ctx.save_for_backward(slope.mul_(target - rival))
        ctx.factor = 1 / (width * scores[..., 0].numel())
        return kept

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope * (grads[0] * ctx.factor), None, None, None, None


def pairwise(
    hashed_q: torch.Tensor,
    hashed_k: torch.Tensor,
    labels: torch.Tensor,
    owned: torch.Tensor,
    weights: torch.Tensor,
    *,
    similarity: float,
    balance: float,
    orthogonality: float,
) -> torch.Tensor:
    """HATA's loss over P pairs of a query and a key, of which few queries own many each.

    Args:
        hashed_q: Relaxed codes of the queries, `[Hkv, G, Q, r]`.
        hashed_k: Relaxed codes of the keys, one per pair, `[Hkv, P, r]`.
        labels: `[Hkv, G, P]`, positive where the codes should agree.
        owned: `[Q, P]`, 1 where the pair is the query's, else 0.
        weights: The projection, `[Hkv, D, r]`.
        similarity: Factor of `sum(labels * |h(q) - h(k)|^2) / P`.
        balance: Factor of `|mean over pairs of (h(q) + h(k)) / r|^2`, summed over heads.
        orthogonality: Factor of `|W'W - I|`, the norm over all heads together.
    """
    pairs, bits = hashed_k.shape[-2:]
    keys = hashed_k[:, None]
    # |h(q) - h(k)|^2 of all queries with all keys, of which the labels pick the pairs.
    apart = hashed_q.square().sum(-1, keepdim=True) + keys.square().sum(-1).unsqueeze(-2)
    apart = apart - 2 * hashed_q @ keys.mT
    apart = (labels.unsqueeze(-2) * owned * apart).sum() / pairs
    both = (owned.sum(-1, keepdim=True) * hashed_q).sum(-2) + keys.sum(-2)
    bias = (both / (pairs * bits)).square().sum()
    unit = torch.eye(bits, dtype=weights.dtype, device=weights.device)
    turned = torch.linalg.vector_norm(weights.mT @ weights - unit)
    return similarity * apart + balance * bias + orthogonality * turned


def matching(
    scores: torch.Tensor, wanted: torch.Tensor, out: torch.Tensor, weight: float
) -> torch.Tensor:
    """HashAttention's loss: weighted binary cross-entropy of sigmoid(scores), a mean over entries.

    Args:
        scores: Products of relaxed codes, `[N, G, Q, S]`.
        wanted: The same shape, 1 where a key is among the exact best, else 0.
        out: `[Q, S]`, true where an entry does not count.
        weight: Weight of a wanted key against another.
    """
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        scores, wanted, pos_weight=scores.new_tensor(weight), reduction="none"
    )
    count = (~out).sum() * (scores[..., 0, 0].numel())
    return losses.masked_fill(out, 0.0).sum() / count.clamp_min(1)
