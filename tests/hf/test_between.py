"""What happens between steps, around them and to the side of them changes no answer."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers import DynamicCache, StaticCache  # noqa: E402

import hata  # noqa: E402
import hata.hf  # noqa: E402
from hata.hf import reasons  # noqa: E402
from hata.hf.models import cache_argument  # noqa: E402

# What this release calls the cache.
CACHE = cache_argument(transformers.LlamaForCausalLM)
ALL_KEYS = hata.Selection(bits=64, k=200, dense_layers=0)
FEW = hata.Selection(bits=64, k=6, dense_layers=0)


def static(model):
    return StaticCache(config=model.config, max_cache_len=64)


@pytest.mark.parametrize("way", [{}, {"cache_implementation": "static", "disable_compile": True}])
def test_generation_from_embeddings(way, tiny, prompts):
    model = tiny("llama")
    embeds = model.get_input_embeddings()(prompts.of(1, 30)).detach()
    given = {"inputs_embeds": embeds, "max_new_tokens": 4, "do_sample": False, **way}
    own = model.generate(**given)
    with hata.hf.attach(model, selection=ALL_KEYS):
        assert torch.equal(own, model.generate(**given))


@pytest.mark.parametrize("biased", [True, False], ids=["bias-later", "bias-first"])
def test_additive_masks_are_looked_at_in_every_step(biased, fresh, prompts, always_hash):
    """On a CPU; a bias that comes later is seen, and one that is gone is gone."""
    model = fresh("llama", attn_implementation="eager")
    low = torch.finfo(torch.float32).min

    def step(cache, length, bias):
        mask = torch.full((1, 1, 1, 64), low)
        mask[..., :length] = 0
        mask[..., :5] = -1.0 if bias else 0.0
        place = torch.tensor([[length - 1]])
        given = {CACHE: cache, "attention_mask": mask, "position_ids": place}
        return model(prompts.of(1, 1), **given).logits

    def run():
        cache = static(model)
        model(prompts.of(1, 40), **{CACHE: cache})
        return torch.cat([step(cache, 41, not biased), step(cache, 42, biased)])

    with torch.no_grad():
        own = run()
        with (
            hata.hf.attach(model, selection=ALL_KEYS) as handle,
            pytest.warns(UserWarning, match="adds numbers to the logits"),
        ):
            torch.testing.assert_close(own, run(), rtol=1e-4, atol=1e-4)
    for layer in handle.report().layers:
        assert layer.dense[reasons.BIAS] == 1
        assert layer.hashed == 1


@pytest.mark.parametrize("how", ["inner-forward", "another-model-within"])
def test_a_pass_without_a_mask_does_not_change_one_that_has_one(how, fresh, prompts, always_hash):
    model, other = fresh("llama"), fresh("qwen3")
    inputs = prompts.padded(rows=2, tokens=30)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)

    def run():
        cache = static(model)
        model(**inputs, **{CACHE: cache})
        model(prompts.of(2, 3))
        given = {CACHE: cache, "attention_mask": mask}
        if how == "inner-forward":
            # Past the hooks of the decoder.
            return model.model.forward(prompts.of(2, 1), **given).last_hidden_state
        hook = model.model.layers[0].register_forward_hook(
            lambda *_: (other(prompts.of(1, 5)), None)[1]
        )
        try:
            return model(prompts.of(2, 1), **given).logits
        finally:
            hook.remove()

    with torch.no_grad(), hata.hf.attach(other, selection=FEW):
        hata.hf.detach(other)
        own = run()
        hata.hf.attach(other, selection=FEW)
        with hata.hf.attach(model, selection=ALL_KEYS):
            torch.testing.assert_close(own, run(), rtol=1e-4, atol=1e-4)
        hata.hf.detach(other)


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_a_copy_of_rewritten_keys_has_no_codes(kind, tiny, prompts):
    model = tiny("llama")
    with torch.no_grad(), hata.hf.attach(model, selection=FEW):
        cache = DynamicCache(config=model.config)
        model(prompts.of(1, 60), **{CACHE: cache})
        for layer in cache.layers:
            layer.keys[:] = layer.keys.flip(2).clone()
        fresh = DynamicCache([(one.keys.clone(), one.values.clone()) for one in cache.layers])
        twin = copy.deepcopy(cache)
        if kind == "shallow":
            twin = copy.copy(cache)
            twin.layers = [copy.copy(layer) for layer in cache.layers]
        a, b = (model(prompts.of(1, 1), **{CACHE: one}).logits for one in (twin, fresh))
    assert torch.equal(a, b)


@pytest.mark.parametrize("operation", ["reorder", "select", "repeat"])
def test_keys_that_are_written_in_inference_mode_after_rows_moved(operation, tiny, prompts):
    model = tiny("llama")
    with torch.inference_mode(), hata.hf.attach(model, selection=FEW):
        cache = DynamicCache(config=model.config)
        model(prompts.of(1, 60), **{CACHE: cache})
        {
            "reorder": lambda: cache.reorder_cache(torch.tensor([0])),
            "select": lambda: cache.batch_select_indices(torch.tensor([0])),
            "repeat": lambda: cache.batch_repeat_interleave(1),
        }[operation]()
        for layer in cache.layers:
            layer.keys[:] = layer.keys.flip(2).clone()
        fresh = DynamicCache([(one.keys.clone(), one.values.clone()) for one in cache.layers])
        a, b = (model(prompts.of(1, 1), **{CACHE: one}).logits for one in (cache, fresh))
    assert torch.equal(a, b)
    with torch.no_grad(), hata.hf.attach(model, selection=FEW):
        model(prompts.of(1, 1), **{CACHE: cache})


def test_gradients_over_several_passes_of_one_cache(fresh, prompts):
    """Only queries are learned: keys need no gradient, and are kept for one all the same."""
    model = fresh("llama")
    model.requires_grad_(False)
    weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)

    def gradient():
        weight.grad = None
        cache = DynamicCache(config=model.config)
        passes = [model(prompts.of(1, n), **{CACHE: cache}).logits for n in (40, 3, 2)]
        sum(one.pow(2).mean() for one in passes).backward()
        return weight.grad.clone()

    own = gradient()
    with hata.hf.attach(model, selection=ALL_KEYS):
        assert torch.equal(own, gradient())


def test_autocast_for_a_while(fresh, prompts):
    model = fresh("llama")

    def run():
        cache = DynamicCache(config=model.config)
        with torch.autocast("cpu", torch.bfloat16):
            model(prompts.of(1, 40), **{CACHE: cache})
        return [model(prompts.of(1, 1), **{CACHE: cache}).logits for _ in range(2)]

    with torch.no_grad():
        own = run()
        with hata.hf.attach(model, selection=ALL_KEYS):
            got = run()
    assert all(torch.equal(a, b) for a, b in zip(own, got, strict=True))


def test_one_mask_for_all_rows(tiny, prompts, always_hash):
    model = tiny("llama")
    mask = torch.ones(1, 1, 1, 64, dtype=torch.bool)
    mask[..., 31:] = False
    mask[..., :4] = False

    def run():
        cache = static(model)
        model(prompts.of(2, 30), **{CACHE: cache})
        return model(prompts.of(2, 1), attention_mask=mask, **{CACHE: cache}).logits

    with torch.no_grad():
        own = run()
        with hata.hf.attach(model, selection=ALL_KEYS):
            torch.testing.assert_close(own, run(), rtol=1e-4, atol=1e-4)


def test_an_attached_model_is_not_pickled(fresh):
    model = fresh("llama")
    with hata.hf.attach(model), pytest.raises(hata.AttachError, match="cannot be pickled; detach"):
        pickle.dumps(model)
    pickle.dumps(model)


def test_models_that_share_layers_are_detached_in_any_order(fresh, prompts, calls):
    """As a draft that leaves early: its layers are those of the model."""
    model = fresh("llama")
    draft = fresh("llama", num_hidden_layers=2)
    draft.model.layers = model.model.layers[:2]
    first = hata.hf.attach(model, selection=FEW)
    second = hata.hf.attach(draft, selection=FEW)
    first.detach()
    with torch.no_grad():
        cache = DynamicCache(config=draft.config)
        for tokens in (30, 1):
            draft(prompts.of(1, tokens), **{CACHE: cache})
    assert [layer.hashed for layer in second.report().layers] == [1, 1]
    second.detach()
    assert not any("_hata" in vars(module) for module in model.modules())
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        for tokens in (30, 1):
            model(prompts.of(1, tokens), **{CACHE: cache})
    assert len(calls) == 2


def test_export_of_a_decode_step(fresh, prompts):
    model = fresh("llama", num_hidden_layers=1)

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.cache = model, static(model)

        def forward(self, token):
            return self.model(token, **{CACHE: self.cache}).logits

    with torch.no_grad(), hata.hf.attach(model, selection=FEW):
        step = Step()
        model(prompts.of(1, 30), **{CACHE: step.cache})
        exported = torch.export.export(step, (prompts.of(1, 1),), strict=False)
    assert any("hata" in str(node.target) for node in exported.graph.nodes)
