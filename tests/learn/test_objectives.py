"""The losses, against what their definitions say, computed slowly."""

import pytest
import torch

from hata.evaluate.mass import group_mass
from hata.learn import objectives

N, G, Q, S, D = 2, 3, 4, 40, 8


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    q, keys = (torch.randn(shape, generator=generator) for shape in ((N, G, Q, D), (N, S, D)))
    visible = torch.tensor([S, S - 1, 20, 30])
    hidden = torch.arange(S) >= visible[:, None]
    scores = torch.randn(N, Q, S, generator=generator, dtype=torch.float64)
    return q, keys, visible, hidden, scores


def test_the_target_is_the_attention_of_the_group(batch):
    q, keys, visible, hidden, _ = batch
    target = objectives.group_target(q, keys, 0.5, hidden)
    for head in range(N):
        expected, _ = group_mass(q[head], keys[head], 0.5, hidden)
        torch.testing.assert_close(target[head], expected, rtol=1e-5, atol=1e-7)
    assert (target[:, 2, int(visible[2]) :] == 0).all()


def test_faint_shares_are_not_denormal():
    q, keys = 100 * torch.eye(2)[None, None], 10 * torch.eye(2)[None]
    target = objectives.group_target(q, keys, 1.0, torch.zeros(2, 2, dtype=torch.bool))
    assert target.min() > torch.finfo(torch.float32).tiny


def test_listwise_is_a_cross_entropy(batch):
    *_, hidden, scores = batch
    target = torch.rand(N, Q, S, dtype=torch.float64).masked_fill(hidden, 0)
    target /= target.sum(-1, keepdim=True)
    expected = 0.0
    for n in range(N):
        for i in range(Q):
            seen = ~hidden[i]
            logged = scores[n, i, seen].log_softmax(0)
            expected -= float((target[n, i, seen] * logged).sum()) / (N * Q)
    found = objectives.listwise(scores, target, hidden)
    assert float(found) == pytest.approx(expected, rel=1e-9)


def soft(scores, target, hidden, budgets, width):
    """Kept mass, with an edge per row that keeps the sum of counts where it is."""
    seen = scores.masked_fill(hidden, -1e30)
    edge = seen.sort(-1, descending=True).values.gather(2, (budgets - 1).expand(N, Q)[..., None])
    count = torch.sigmoid((scores - edge.detach()) / width).masked_fill(hidden, 0)
    with torch.no_grad():
        slope = count * (1 - count)
        rival = (slope * target).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True)
    return (target * count).sum(-1).mean(), ((target - rival) * count).sum(-1).mean()


def test_kept_mass_and_its_gradient(batch):
    *_, hidden, scores = batch
    target = torch.rand(N, Q, S, dtype=torch.float64).masked_fill(hidden, 0)
    budgets = torch.tensor([3, 5, 2, 7])
    scores.requires_grad_()
    value, surrogate = soft(scores, target, hidden, budgets, 0.3)
    (expected,) = torch.autograd.grad(surrogate, scores)
    found = objectives.kept_mass(scores, target, hidden, budgets, 0.3)
    assert found.item() == pytest.approx(value.item())
    (gradient,) = torch.autograd.grad(found, scores)
    torch.testing.assert_close(gradient, expected)
    # What one key gains at the edge, another loses: the budget stays what it is.
    same = target.new_full(target.shape, 0.5).masked_fill(hidden, 0)
    (gradient,) = torch.autograd.grad(
        objectives.kept_mass(scores, same, hidden, budgets, 0.3), scores
    )
    assert gradient.abs().max() < 1e-12


def test_a_narrow_edge_counts_the_budget(batch):
    *_, hidden, scores = batch
    target = torch.rand(N, Q, S, dtype=torch.float64).masked_fill(hidden, 0)
    budgets = torch.full((Q,), 6)
    best = scores.masked_fill(hidden, -1e30).topk(6, -1).indices
    kept = objectives.kept_mass(scores, target, hidden, budgets, 1e-9)
    # The last key of the budget stands on the edge, and counts half.
    weights = torch.tensor([1, 1, 1, 1, 1, 0.5], dtype=torch.float64)
    expected = (target.gather(2, best) * weights).sum(-1).mean()
    assert kept.item() == pytest.approx(expected.item())


def test_pairwise_is_hatas_loss():
    generator = torch.Generator().manual_seed(0)
    queries, pairs, bits = 3, 20, 8

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    h_q, h_k, weights = normal(N, G, queries, bits), normal(N, pairs, bits), normal(N, D, bits)
    labels = normal(N, G, pairs)
    owner = torch.randint(queries, (pairs,), generator=generator)
    similar = sum(
        labels[n, g, i] * (h_q[n, g, owner[i]] - h_k[n, i]).square().sum()
        for n in range(N)
        for g in range(G)
        for i in range(pairs)
    )
    balance = sum(
        ((h_q[n, g, owner] + h_k[n]).mean(0) / bits).square().sum()
        for n in range(N)
        for g in range(G)
    )
    turned = torch.linalg.norm((weights.mT @ weights - torch.eye(bits)).flatten())
    found = objectives.pairwise(
        h_q,
        h_k,
        labels,
        (owner == torch.arange(queries)[:, None]).double(),
        weights,
        similarity=0.01,
        balance=1.0,
        orthogonality=2.0,
    )
    expected = 0.01 * similar / pairs + balance + 2 * turned
    assert float(found) == pytest.approx(float(expected))


def test_matching_is_a_weighted_cross_entropy(batch):
    *_, hidden, scores = batch
    scores = torch.stack([scores, -scores], 1)  # [N, G, Q, S]
    wanted = (torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)) < 0.2).double()
    seen = (~hidden).expand_as(scores)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        scores[seen], wanted[seen], pos_weight=torch.tensor(20.0, dtype=torch.float64)
    )
    found = objectives.matching(scores, wanted, hidden, 20.0)
    assert found.item() == pytest.approx(expected.item())
    nothing = objectives.matching(scores, wanted, torch.ones_like(hidden), 20.0)
    assert nothing.item() == 0
