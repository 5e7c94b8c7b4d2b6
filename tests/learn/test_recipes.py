"""Every recipe learns, repeatably, and what it exports hashes as it did in training."""

import dataclasses

import numpy as np
import pytest
import torch

import hata
from hata.encoder import ModelShape
from hata.encoder.encoder import of_layers
from hata.evaluate.retained import measure
from hata.evaluate.selectors import Asked, Coded
from hata.learn.hashattention import HashAttention
from hata.learn.hasher import Hasher, hard_sign, soft_sign, straight_through
from hata.learn.hata_recipe import HataRecipe
from hata.learn.listwise import Listwise, prefixes_of

RECIPES = {
    "listwise": (Listwise(queries=48), 64, 60),
    "hata": (HataRecipe(pairs=2000, chunk=1000), 32, 40),
    "hashattention": (HashAttention(edges=16), 32, 80),
}


def kept(samples, learned, bits, widths):
    """Share of exact top-k's mass that 16 keys of the last queries hold, for each width."""
    shape = ModelShape("", 1, samples.kv_heads * samples.group, samples.kv_heads, samples.head_dim)
    encoder = of_layers(shape, bits, [learned], made={})
    read = samples.reads[1]
    positions = read.positions[-64:]
    hidden = torch.arange(read.keys.shape[1]) > positions[:, None]
    asked = Asked(0, read.q[:, :, -64:], read.keys, hidden)
    with torch.no_grad():
        found = measure(asked, samples.scale, [Coded(str(n), encoder, n) for n in widths], [16])
    return [mass / exact for mass, exact, _ in found.values()]


@pytest.mark.parametrize("name", RECIPES)
def test_training_raises_what_is_kept(samples, name):
    recipe, bits, steps = RECIPES[name]
    seen = []

    def watch(step, loss, export):
        seen.append((step, loss))
        if step == 0:
            seen.append(export())

    learned = recipe.train(samples, bits, steps, 1, watch)
    (first,) = [one for one in seen if not isinstance(one[0], int)]
    (before,), (after,) = (kept(samples, one, bits, [bits]) for one in (first, learned))
    assert len(seen) == steps + 1
    assert after > before
    # The baselines need more steps than a test has.
    assert after > (0.8 if name == "listwise" else 0.5)


def test_the_first_bits_are_a_code_of_their_own(samples):
    learned = Listwise(queries=48).train(samples, 128, 80, 0, lambda *_: None)
    shares = kept(samples, learned, 128, [32, 64, 128])
    assert shares == sorted(shares)
    assert shares[0] > 0.8
    assert prefixes_of(128) == (32, 64, 128)
    assert prefixes_of(96) == (32, 64, 96)


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_seed_gives_the_same_weights(samples, name):
    recipe, bits, _ = RECIPES[name]
    once, again, other = (
        recipe.train(samples, bits, 5, seed, lambda *_: None) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(once.projection, again.projection)
    assert not np.array_equal(once.projection, other.projection)


@pytest.fixture
def hasher(samples):
    generator = torch.Generator().manual_seed(0)
    made = Hasher(*samples.start(), group=2, bits=96, codes=3, generator=generator)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made


def test_the_export_hashes_as_the_hasher_does(samples, hasher):
    """Codes by `hata.encode` of the exported, rounded weights: only bits on the edge differ."""
    learned = hasher.export()
    read = samples.reads[0]
    q, keys = read.q[:, :, :50], read.keys
    with torch.no_grad():
        expected = hasher.encode_keys(keys, hard_sign)
        wanted = hasher.encode_queries(q, hard_sign) * 6
    codes = hata.encode(
        keys[None].contiguous(),
        torch.from_numpy(learned.projection),
        torch.from_numpy(learned.bias),
    )[0]
    bits = torch.from_numpy(np.unpackbits(codes.numpy(), axis=-1, bitorder="little")) * 2.0 - 1
    assert (bits == expected).float().mean() > 0.99
    given = q.flatten(0, 1)[None].repeat_interleave(3, dim=1).contiguous()
    codes = hata.encode(
        given, torch.from_numpy(learned.query.projection), torch.from_numpy(learned.query.bias)
    )[0]
    bits = torch.from_numpy(np.unpackbits(codes.numpy(), axis=-1, bitorder="little")) * 2.0 - 1
    summed = bits.unflatten(0, (2, 6)).sum(1)
    assert (summed - wanted).abs().mean() < 0.1
    for array in (learned.projection, learned.bias, learned.query.projection):
        rounded = torch.from_numpy(array).bfloat16().float().numpy()
        np.testing.assert_array_equal(rounded, array)


def test_the_start_estimates_the_products(samples):
    """Before any training, agreement of codes orders keys about as q.k does."""
    generator = torch.Generator().manual_seed(0)
    made = Hasher(*samples.start(), group=2, bits=512, codes=4, generator=generator)
    read = samples.reads[0]
    with torch.no_grad():
        scores = made.encode_queries(read.q, hard_sign) @ made.encode_keys(read.keys, hard_sign).mT
    centred = read.keys - read.keys.mean(1, keepdim=True)
    exact = read.q.sum(1) @ centred.mT
    for head in range(2):
        together = torch.stack([scores[head].flatten(), exact[head].flatten()])
        assert torch.corrcoef(together)[0, 1] > 0.9


def test_signs():
    x = torch.tensor([-2.0, -0.0, 0.0, 0.3, float("nan")], requires_grad=True)
    assert hard_sign(x).tolist() == [-1, -1, -1, 1, -1]
    straight = straight_through(2.0)(x[:4])
    assert straight.tolist() == [-1, -1, -1, 1]
    (found,) = torch.autograd.grad(straight.sum(), x)
    (expected,) = torch.autograd.grad(soft_sign(2.0)(x[:4]).sum(), x)
    torch.testing.assert_close(found, expected)


def test_hatas_settings_are_those_of_the_paper():
    recipe = HataRecipe()
    assert (recipe.similarity, recipe.balance, recipe.orthogonality) == (0.01, 1.0, 2.0)
    assert (recipe.rate, recipe.momentum, recipe.decay) == (0.1, 0.9, 1e-6)
    assert (recipe.sharpness, recipe.best, recipe.steps, recipe.epoch) == (0.1, 0.1, 300, 20)
    assert 150_000 <= recipe.pairs <= 300_000


def test_hatas_labels(samples):
    recipe = dataclasses.replace(HataRecipe(), pairs=300)
    queries, keys, labels, owner = recipe._pairs(samples, torch.Generator().manual_seed(0))
    assert keys.shape[1] == labels.shape[2] == len(owner) >= 300
    first = owner == 0
    seen = int(first.sum())
    row = labels[0, 1, first]
    products = keys[0, first] @ queries[0, 1, 0]
    wanted = int(0.1 * seen)
    assert (row > 0).sum() == wanted
    assert row.max() == 20
    assert row[row > 0].min() == 1
    assert set(products.topk(wanted).indices.tolist()) == set((row > 0).nonzero()[:, 0].tolist())


def test_a_batch_shows_each_query_what_it_sees(samples):
    def draw(most=None):
        generator = torch.Generator().manual_seed(3)
        return samples.batch(1, 20, 400, generator, most)

    whole = draw()
    read = samples.reads[1]
    assert whole.q.shape == (2, 2, 20, 32)
    assert whole.visible.max() <= 400
    assert whole.keys.shape[1] == whole.visible.max()
    assert torch.equal(whole.keys, read.keys[:, : whole.keys.shape[1]])
    for row, seen in zip(whole.hidden, whole.visible, strict=True):
        assert int((~row).sum()) == int(seen)
    thinned = draw(most=100)
    assert thinned.keys.shape[1] == 100
    assert torch.equal(thinned.q, whole.q)
    # Each thinned key is one of the sequence's, in order, and is seen by whom it was seen before.
    match = (thinned.keys[0][:, None] == read.keys[0]).all(-1).float().argmax(1)
    assert (match.diff() > 0).all()
    for row, seen in zip(thinned.hidden, whole.visible, strict=True):
        assert torch.equal(~row, match < seen)
