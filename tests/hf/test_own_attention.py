"""With a budget of all keys an attached model answers as it does by itself, whatever it is."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask  # noqa: E402
from transformers.modeling_utils import AttentionInterface  # noqa: E402

import hata  # noqa: E402
import hata.hf  # noqa: E402
from hata.hf import models, reasons  # noqa: E402

ALL_KEYS = hata.Selection(bits=64, k=200, dense_layers=0, min_length=0)
FEW = hata.Selection(bits=64, k=6, dense_layers=0, min_length=0)
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
INDEXER = {**LATENT, "index_topk": 8, "index_head_dim": 32, "index_n_heads": 2}
# Configuration, model, sizes; why its layers are planned dense.
OTHERS = {
    "values-of-its-own": ("DiffLlama", {}, "it attends to parts of its values, twice"),
    "indexer": ("DeepseekV32", INDEXER, "indexer of its own"),
    "latent": ("DeepseekV3", LATENT, models.LATENT),
    "eager-masks": (
        "DeepseekV4",
        {
            "q_lora_rank": 32,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "sliding_window": 9,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
        },
        "sliding window",
    ),
}
WAYS = {
    "dynamic": ({}, False),
    "static": ({"cache_implementation": "static", "disable_compile": True}, False),
    "padded": ({}, True),
}


def both(model, way, prompts, answer, selection=ALL_KEYS, **kwargs):
    """A model's own answer, the one when attached, and the handle."""
    settings, padded = WAYS[way]
    inputs = prompts.padded(rows=2, tokens=40) if padded else prompts.of(1, 40)
    own = answer(model, inputs, **settings, **kwargs)
    with hata.hf.attach(model, selection=selection, check=False) as handle:
        return own, answer(model, inputs, **settings, **kwargs), handle


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", OTHERS)
def test_models_that_cannot_be_hashed_are_dense_and_told(kind, way, fresh, prompts, answer, calls):
    name, sizes, why = OTHERS[kind]
    if kind == "eager-masks" and way == "static":
        pytest.skip("this model cannot use a static cache")
    model = fresh((f"{name}Config", f"{name}ForCausalLM", sizes))
    with pytest.warns(UserWarning, match=f"no layer will use hash attention: .*{why}"):
        own, got, handle = both(model, way, prompts, answer)
    assert torch.equal(own.tokens, got.tokens)
    assert torch.equal(own.logits, got.logits)
    assert not calls
    assert all(why in layer.why for layer in handle.report().layers)
    with pytest.raises(hata.AttachError, match=f"no layer will use hash attention: .*{why}"):
        hata.hf.attach(model, strict=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["values-of-its-own", "latent"])
def test_what_is_not_known_beforehand_is_found_at_the_first_step(
    kind, way, fresh, prompts, answer, calls, monkeypatch
):
    """As a model of a family that nobody has tried."""
    name, sizes, _ = OTHERS[kind]
    model = fresh((f"{name}Config", f"{name}ForCausalLM", sizes))
    monkeypatch.setattr(models, "DENSE", {})
    monkeypatch.setattr(model.config, "model_type", "unheard-of")
    if kind == "latent":
        monkeypatch.setattr(models, "why_dense", lambda config: [""] * 3)
    why = "cache holds 1 heads of size 32" if kind == "latent" else "not those of the layer's cache"
    settings, padded = WAYS[way]
    inputs = prompts.padded(rows=2, tokens=40) if padded else prompts.of(1, 40)
    own = answer(model, inputs, **settings)
    with hata.hf.attach(model, selection=FEW, check=False) as handle:
        got = answer(model, inputs, **settings)
    assert torch.equal(own.logits, got.logits)
    assert not calls
    for layer in handle.report().layers:
        assert not layer.hashed
        assert any(why in told for told in layer.dense)


def test_a_model_that_makes_its_own_kind_of_cache(fresh, prompts, answer, calls):
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 4}
    model = fresh(("MiniMaxConfig", "MiniMaxForCausalLM", sizes))
    own, got, handle = both(model, "dynamic", prompts, answer)
    assert torch.equal(own.logits, got.logits)
    own, got, handle = both(model, "dynamic", prompts, answer, FEW)
    assert not torch.equal(own.logits, got.logits)
    assert len(calls) == sum(layer.hashed for layer in handle.report().layers) == 2 * 9
    assert {layer.why for layer in handle.report().layers if layer.selection is None} == {
        "linear attention or a state space, by itself or beside its attention"
    }


@pytest.mark.parametrize("way", WAYS)
def test_layers_of_several_head_sizes(way, fresh, prompts, answer, always_hash, calls):
    """Gemma 4: full-attention layers have heads of 512, the others of 16."""
    sizes = {
        "num_hidden_layers": 4,
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    model = fresh(("Gemma4TextConfig", "Gemma4ForCausalLM", sizes))
    own, got, handle = both(model, way, prompts, answer)
    assert handle.encoder.shape.head_dim == 512
    torch.testing.assert_close(own.logits, got.logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(own.tokens, got.tokens)
    assert [layer.hashed for layer in handle.report().layers] == [0, 9, 0, 9]
    assert len(calls) == 18


@pytest.fixture
def halved():
    """An attention function of the user's own: SDPA of half the query."""

    def attend(module, query, *args, **kwargs):
        return sdpa_attention_forward(module, query * 0.5, *args, **kwargs)

    AttentionInterface.register("halved", attend)
    AttentionMaskInterface.register("halved", sdpa_mask)
    yield "halved"
    del AttentionInterface._global_mapping["halved"]
    del AttentionMaskInterface._global_mapping["halved"]


@pytest.mark.parametrize("way", WAYS)
def test_a_function_of_the_users_own_is_run(way, fresh, prompts, answer, halved, calls):
    model = fresh("llama")
    model.set_attn_implementation(halved)
    own, got, handle = both(model, way, prompts, answer, FEW)
    assert torch.equal(own.logits, got.logits)
    told = list(handle.report().layers[0].dense)
    assert any("an attention function of its own: halved.<locals>.attend" in why for why in told)
    assert not calls


def test_another_implementation_while_attached(fresh, prompts, answer, calls):
    model = fresh("llama")
    with hata.hf.attach(model, selection=FEW) as handle:
        answer(model, prompts.of(1, 23))
        for count, name in ((2, "eager"), (3, "sdpa")):
            model.set_attn_implementation(name)
            answer(model, prompts.of(1, 23))
            assert [layer.hashed for layer in handle.report().layers] == [9 * count] * 3
    assert len(calls) == 3 * 27
    assert model.config._attn_implementation == "sdpa"


def test_arguments_that_ask_for_more_run_the_models_own(tiny, prompts, calls):
    """A model's own sparse selection: what SDPA ignores, its own function need not."""
    model, ids = tiny("llama"), prompts.of(1, 30)
    with torch.no_grad(), hata.hf.attach(model, selection=FEW) as handle:
        cache = models.cache_among(model(ids))
        given = {models.cache_argument(model): cache}
        with pytest.warns(UserWarning, match="argument of its attention that is not known: ind"):
            model(ids[:, :1], indices=torch.zeros(1), **given)
    assert not calls
    assert all(layer.hashed == 0 for layer in handle.report().layers)


def test_autocast(fresh, prompts, answer, calls):
    """Queries stay float32 there and values do not: dense, and said; before, it was an error."""
    model = fresh("llama")
    with torch.autocast("cpu", torch.bfloat16):
        own, got, handle = both(model, "dynamic", prompts, answer, FEW)
    assert torch.equal(own.logits, got.logits)
    assert handle.report().layers[0].dense[reasons.DTYPES] == 9
    assert not calls


def test_attention_weights_are_dense_ones(fresh, prompts):
    model, ids = fresh("llama", attn_implementation="eager"), prompts.of(1, 23)
    given = {"max_new_tokens": 4, "output_attentions": True, "return_dict_in_generate": True}
    own = model.generate(ids, do_sample=False, **given)
    with (
        hata.hf.attach(model, selection=FEW),
        pytest.warns(UserWarning, match="attention weights are asked for; leave output_attentions"),
    ):
        got = model.generate(ids, do_sample=False, **given)
    assert [len(step) for step in got.attentions] == [3] * 4
    for ours, theirs in zip(got.attentions, own.attentions, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_models_that_are_not_causal_are_refused():
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(hata.AttachError, match=r"BertForMaskedLM.*not causal"):
        hata.hf.attach(transformers.BertForMaskedLM(config))


def test_tensor_parallel_is_refused(fresh, monkeypatch):
    model = fresh("llama")
    monkeypatch.setattr(model, "_tp_size", 2)
    with pytest.raises(hata.AttachError, match=r"tensor parallelism.*not supported yet"):
        hata.hf.attach(model)


def test_a_mask_that_adds_to_the_logits_is_dense(fresh, prompts, calls):
    """Biases by position come as masks of floats too, which hide nothing."""
    model, ids = fresh("llama", attn_implementation="eager"), prompts.of(1, 30)
    slopes = torch.arange(31.0).view(1, 1, 1, -1) / 8
    with torch.no_grad(), hata.hf.attach(model, selection=FEW) as handle:
        given = {models.cache_argument(model): models.cache_among(model(ids))}
        with pytest.warns(UserWarning, match="a mask that adds numbers to the logits"):
            model(ids[:, :1], attention_mask=slopes, **given)
    assert not calls
    assert reasons.BIAS in handle.report().layers[0].dense
