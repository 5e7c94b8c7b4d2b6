"""What can and cannot be attached to, and that nothing of it is left behind."""

import copy
import json
import warnings
from contextlib import nullcontext

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    DynamicCache,
    StaticCache,
    modeling_utils,
)
from transformers.modeling_utils import AttentionInterface  # noqa: E402

import hata  # noqa: E402
import hata.hf  # noqa: E402
from hata.hf import attachment, forward_pass, reasons  # noqa: E402
from hata.hf.models import cache_argument  # noqa: E402

# What this release calls the cache.
CACHE = cache_argument(transformers.LlamaForCausalLM)

FEW = hata.Selection(bits=64, k=5, dense_layers=1)


def untouched(model, before):
    """Whether a model is as it was: attention, hooks, attributes, answers."""
    implementation, answer = before
    return (
        model.config._attn_implementation == implementation
        and type(modeling_utils.ALL_ATTENTION_FUNCTIONS) is AttentionInterface
        and "prepare_inputs_for_generation" not in vars(model)
        and not any("_hata" in name for module in model.modules() for name in module.__dict__)
        and not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
        and torch.equal(answer.logits, answer.again().logits)
    )


@pytest.fixture
def remembered(answer, prompts):
    """What a model answers before it is attached to, and how to ask again."""

    def of(model):
        found = answer(model, prompts.of(1, 23))
        found.again = lambda: answer(model, prompts.of(1, 23))
        return model.config._attn_implementation, found

    return of


def test_fault_59_attention_that_cannot_be_taken_over(tiny, monkeypatch, remembered):
    """A release whose modules get their function in another way is refused, not left dense."""
    before = remembered(tiny("llama"))
    with monkeypatch.context() as patch:
        patch.delattr(AttentionInterface, "get_interface")
        with pytest.raises(hata.AttachError, match=r"no get_interface.*tested release"):
            hata.hf.attach(tiny("llama"))
    assert untouched(tiny("llama"), before)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_fault_59_masks_are_those_of_the_model(implementation, fresh, prompts, answer):
    """An attached model keeps its implementation, and with it the kind of its masks."""
    model = fresh("llama", attn_implementation=implementation)
    seen = []
    hook = model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    own = answer(model, prompts.padded())
    count = len(seen)
    with hata.hf.attach(model, selection=FEW):
        assert model.config._attn_implementation == implementation
        answer(model, prompts.padded())
    hook.remove()
    assert own.tokens.shape[0] == 3
    for before, attached in zip(seen[:count], seen[count:], strict=True):
        assert (before is None) == (attached is None)
        assert before is None or before.dtype == attached.dtype
        assert before is None or torch.equal(before, attached)


@pytest.mark.parametrize("mode", ["dynamic", "static", "padded"])
@pytest.mark.parametrize("family", ["mistral-sliding", "qwen3-mixed", "gemma2", "gpt-oss"])
def test_fault_60_sliding_windows_soft_caps_sinks(
    family, mode, fresh, prompts, answer, by_brute_force, calls
):
    # Eager, so that the model's own attention has the soft cap and the sinks in it.
    model = fresh(family, attn_implementation="eager")
    inputs = prompts.padded() if mode == "padded" else prompts.of(1, 23)
    kwargs = {"cache_implementation": "static"} if mode == "static" else {}
    own = answer(model, inputs, **kwargs)
    every = hata.Selection(bits=64, k=5, dense_layers=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = hata.hf.attach(model, selection=every)
    got = answer(model, inputs, **kwargs)
    handle.detach()
    if family == "mistral-sliding":
        assert handle.selections == (None, None, None)
        assert not calls
        assert torch.equal(own.logits, got.logits)
        return
    assert [chosen is None for chosen in handle.selections] == [False, True, False]
    expected = by_brute_force(model, handle, inputs, **kwargs)
    torch.testing.assert_close(expected.logits, got.logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(expected.tokens, got.tokens)
    assert calls
    assert (family == "gemma2") == (calls[0]["softcap"] is not None)
    assert (family == "gpt-oss") == (calls[0]["sink_logits"] is not None)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
def test_fault_69_eager_models_keep_their_own_attention(family, mode, fresh, prompts, answer):
    model = fresh(family, attn_implementation="eager")
    kwargs = {"cache_implementation": "static"} if mode == "static" else {}
    inputs = prompts.padded()
    own = answer(model, inputs, **kwargs)
    with hata.hf.attach(model, selection=hata.Selection(bits=64, k=200, dense_layers=1)):
        got = answer(model, inputs, **kwargs)
    assert torch.equal(own.tokens, got.tokens)
    if mode == "dynamic":
        assert torch.equal(own.logits, got.logits)


def test_no_layer_left_to_hash_is_said(tiny):
    with pytest.warns(UserWarning, match="no layer will use hash attention"):
        hata.hf.attach(tiny("mistral-sliding")).detach()


def test_other_architectures(fresh, answer, prompts, by_brute_force):
    model = fresh("gpt2")
    with hata.hf.attach(model, selection=hata.Selection(bits=64, k=5, dense_layers=1)) as handle:
        got = answer(model, prompts.of(1, 23))
    expected = by_brute_force(model, handle, prompts.of(1, 23))
    assert torch.equal(expected.tokens, got.tokens)


def test_fault_63_unsupported_model(fresh):
    model = fresh("bloom", n_layer=1, n_head=4)
    with pytest.raises(hata.AttachError, match=r"BloomForCausalLM.*Llama, Qwen2, Qwen3 or Mistral"):
        hata.hf.attach(model)
    with pytest.raises(hata.AttachError, match=r"got Linear.*decoder-only"):
        hata.hf.attach(torch.nn.Linear(1, 1))
    config = transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
    with pytest.raises(hata.AttachError, match="T5ForConditionalGeneration, an encoder-decoder"):
        hata.hf.attach(transformers.T5ForConditionalGeneration(config))


def test_unsupported_head_size_is_refused_at_attach(fresh):
    with pytest.raises(hata.AttachError, match=r"head size 20.*multiples of 16"):
        hata.hf.attach(fresh("llama", head_dim=20))


@pytest.mark.parametrize("version", ["5.16.2", "5.25.0", "6.0.0.dev0"])
def test_fault_64_untested_transformers_warns_once(version, tiny, monkeypatch):
    attachment._check_version.cache_clear()
    monkeypatch.setattr("hata.hf.attachment.transformers.__version__", version)
    with pytest.warns(UserWarning, match=r"outside the range .* 5\.17 to 5\.24"):
        hata.hf.attach(tiny("llama")).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hata.hf.attach(tiny("llama")).detach()


def test_fault_65_save_while_attached(tiny, tmp_path, answer, prompts):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "before")
    with hata.hf.attach(model, selection=FEW):
        answer(model, prompts.of(1, 23))
        model.save_pretrained(tmp_path / "attached")
    assert "hata" not in (tmp_path / "attached" / "config.json").read_text()
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "attached" / file.name).read_bytes()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "attached")
    assert again.config._attn_implementation == "sdpa"
    assert "hata" not in json.dumps(model.config.to_dict())


def test_fault_66_nothing_is_attached_when_the_encoder_does_not_fit(
    tiny, fresh, tmp_path, remembered
):
    model, other = tiny("llama"), fresh("qwen2", num_key_value_heads=4)
    before = remembered(model)
    encoder = hata.Encoder.random(other.config, 64)
    with pytest.raises(hata.EncoderError, match=r"model_type 'qwen2' against 'llama'.*kv_heads 4"):
        hata.hf.attach(model, encoder)
    encoder = hata.Encoder.random(model.config, 64)
    with pytest.raises(hata.EncoderError, match="got 128, expected at most 64"):
        hata.hf.attach(model, encoder, selection=hata.Selection(bits=128, k=4))
    path = tmp_path / "encoder.safetensors"
    encoder.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(hata.EncoderError, match=r"encoder\.safetensors.*cannot be read"):
        hata.hf.attach(model, path)
    with pytest.raises(hata.EncoderError, match="got int, expected a path"):
        hata.hf.attach(model, 7)
    assert untouched(model, before)


def test_fault_67_pickle_is_refused(tiny, tmp_path):
    torch.save({}, tmp_path / "hash.pt")
    with pytest.raises(hata.EncoderError, match=r"pickle.*hata convert"):
        hata.hf.attach(tiny("llama"), tmp_path / "hash.pt")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_fault_68_padded_batches_equal_one_by_one(side, kind, tiny, prompts):
    """Left padding is hashed; holes, which right padding leaves behind, are dense and right."""
    model = tiny("llama")
    inputs = prompts.padded(side=side)
    steps = prompts.of(3, 4).split(1, 1)
    # Where the mask has holes decoding is dense, so one by one is made dense there as well.
    policy = FEW if side == "left" else hata.Selection(bits=64, k=200, dense_layers=1)

    def run(ids, mask):
        cache = DynamicCache(config=model.config)
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=40)
        logits = []
        for tokens in (ids, *steps_of):
            if tokens is not ids:
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            out = model(tokens, attention_mask=mask, position_ids=positions, **{CACHE: cache})
            logits.append(out.logits[:, -1])
        return torch.stack(logits[1:], 1)

    with torch.no_grad(), hata.hf.attach(model, selection=policy):
        steps_of = steps
        # A static cache does not tell how many keys it holds, so that its dense steps are not
        # known to be within the budget.
        holes = kind == "static" and side == "right"
        with pytest.warns(UserWarning, match="more than left") if holes else nullcontext():
            together = run(inputs["input_ids"], inputs["attention_mask"])
        for row in range(3):
            seen = inputs["attention_mask"][row].bool()
            steps_of = [token[row : row + 1] for token in steps]
            ids, mask = (inputs[name][row, seen][None] for name in ("input_ids", "attention_mask"))
            alone = run(ids, mask)
            torch.testing.assert_close(together[row], alone[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_masks_with_holes_stay_dense(kind, tiny, prompts, calls):
    model, ids = tiny("llama"), prompts.of(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 7:9] = 0

    def run():
        cache = DynamicCache(config=model.config)
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=40)
        with torch.no_grad():
            model(ids, attention_mask=mask, **{CACHE: cache})
            longer = torch.cat([mask, mask[:, :1]], 1)
            return model(prompts.of(2, 1), attention_mask=longer, **{CACHE: cache}).logits

    own = run()
    with hata.hf.attach(model, selection=FEW) as handle:
        with pytest.warns(UserWarning, match="layer 1 .* hides more than left padding"):
            assert torch.equal(own, run())
        assert [layer.dense for layer in handle.report().layers[1:]] == [
            {reasons.PREFILL: 1, reasons.HOLES: 1}
        ] * 2
    assert not calls


def test_fault_70_training_is_dense_and_differentiable(fresh, prompts):
    model = fresh("llama").train()
    ids = prompts.of(2, 12)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    own = gradients()
    with hata.hf.attach(model, selection=FEW):
        attached = gradients()
        # A recorded decode step as well, in evaluation mode, over a cache.
        model.eval()
        model.zero_grad()
        cache = DynamicCache(config=model.config)
        model(ids, **{CACHE: cache})
        with pytest.warns(UserWarning, match=r"gradients are recorded; decode under torch.no_grad"):
            logits = model(ids[:, :1], **{CACHE: cache}).logits
        logits.sum().backward()
        assert model.model.layers[1].self_attn.k_proj.weight.grad.abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(own, attached, strict=True))


def test_detach_undoes_everything(tiny, remembered, prompts):
    model = tiny("llama")
    before = remembered(model)
    handle = hata.hf.attach(model, selection=FEW)
    assert model.config._attn_implementation == "sdpa"
    assert "attached LlamaForCausalLM: 2 of 3 layers planned" in repr(handle)
    handle.detach()
    handle.detach()
    assert "detached" in repr(handle)
    assert untouched(model, before)
    with pytest.raises(ZeroDivisionError), hata.hf.attach(model, selection=FEW):
        raise ZeroDivisionError
    assert untouched(model, before)


def test_exception_in_a_forward_pass_leaves_no_cache_behind(fresh, prompts, monkeypatch):
    model = fresh("llama")
    handle = hata.hf.attach(model, selection=FEW)
    with pytest.raises(IndexError):
        model(torch.full((1, 5), 10_000))
    assert forward_pass.current().layer is None
    handle.detach()


def test_attaching_twice_is_refused(tiny):
    with hata.hf.attach(tiny("llama"), selection=FEW):
        with pytest.raises(hata.AttachError, match="already attached; call detach"):
            hata.hf.attach(tiny("llama"), selection=FEW)
        with pytest.raises(hata.AttachError, match="already attached"):
            hata.hf.attach(tiny("llama").model, selection=FEW)
    hata.hf.attach(tiny("llama"), selection=FEW).detach()


def test_two_models_with_two_encoders_do_not_interfere(fresh, prompts, answer):
    models = [fresh("llama"), fresh("llama")]
    encoders = [hata.Encoder.random(models[0].config, bits, seed=bits) for bits in (64, 128)]
    policies = [hata.Selection(bits=bits, k=5, dense_layers=0) for bits in (64, 128)]
    ids = prompts.of(1, 23)
    alone = []
    for model, encoder, policy in zip(models, encoders, policies, strict=True):
        with hata.hf.attach(model, encoder, selection=policy):
            alone.append(answer(model, ids).logits)
    with (
        hata.hf.attach(models[0], encoders[0], selection=policies[0]),
        hata.hf.attach(models[1], encoders[1], selection=policies[1]),
    ):
        for i in (0, 1, 0):
            assert torch.equal(alone[i], answer(models[i], ids).logits)
    assert not torch.equal(alone[0], alone[1])


def test_a_copied_model_is_attached_on_its_own(fresh, prompts, answer):
    model, ids = fresh("llama"), prompts.of(1, 23)
    handle = hata.hf.attach(model, selection=FEW)
    expected = answer(model, ids)
    twin = copy.deepcopy(model)
    handle.detach()
    assert torch.equal(expected.logits, answer(twin, ids).logits)
    dense = answer(model, ids)
    assert not torch.equal(expected.logits, dense.logits)
    with pytest.raises(hata.AttachError, match=r"already attached.*hata\.hf\.detach\(model\)"):
        hata.hf.attach(twin)
    for _ in range(2):
        hata.hf.detach(twin)
        assert torch.equal(dense.logits, answer(twin, ids).logits)
    assert twin.config._attn_implementation == model.config._attn_implementation == "sdpa"
    with pytest.raises(hata.AttachError, match="model: got Handle"):
        hata.hf.detach(handle)


def test_selection_per_layer(tiny, prompts, answer, calls):
    model = tiny("llama")
    per_layer = [hata.Selection(bits=32, k=4), None, hata.Selection(bits=96, k=9)]
    with hata.hf.attach(model, selection=per_layer) as handle:
        answer(model, prompts.of(1, 23), max_new_tokens=2)
    assert handle.selections == tuple(per_layer)
    assert handle.encoder.bits == 96
    assert {call["dense_below"] for call in calls} == {4, 9}
    for wrong, message in ((per_layer[:2], "got 2 layers, expected 3"), ([1, 2, 3], "got int")):
        with pytest.raises(hata.AttachError, match=message):
            hata.hf.attach(model, selection=wrong)


def test_a_handle_says_which_layers_hash_with_what(fresh):
    model = fresh("llama", num_hidden_layers=6)
    few, more = hata.Selection(bits=32, k=4), hata.Selection(bits=64, k=9)
    with hata.hf.attach(model, selection=[None, few, few, more, few, more]) as handle:
        head, *lines = str(handle).splitlines()
    assert head.startswith("<hata.hf.Handle attached LlamaForCausalLM: 5 of 6 layers planned")
    assert lines == [
        "  layers 0: dense",
        f"  layers 1-2, 4: {few}",
        f"  layers 3, 5: {more}",
        "so far:",
        "  layers 0: dense: its selection says so",
        "  layers 1-5: 0 steps hashed",
    ]


def test_default_selection_and_encoder(tiny, monkeypatch):
    with hata.hf.attach(tiny("llama")) as handle:
        assert handle.selections == (None, None, hata.hf.DEFAULT_SELECTION)
        assert handle.source == "default"
    encoder = hata.Encoder.random(tiny("llama").config, 64)
    with hata.hf.attach(tiny("llama"), encoder) as handle:
        assert handle.selections[2].bits == 64


def test_two_models_of_one_configuration(fresh, prompts, answer):
    first = fresh("llama")
    second = type(first)(first.config).eval()
    prompt = prompts.of(1, 23)
    own = answer(second, prompt)
    with hata.hf.attach(first, selection=FEW) as handle:
        assert torch.equal(own.logits, answer(second, prompt).logits)
        assert not any(layer.hashed for layer in handle.report().layers)
        hata.hf.attach(second, selection=FEW).detach()
        assert torch.equal(own.logits, answer(second, prompt).logits)


def test_float64_is_refused(fresh):
    with pytest.raises(hata.AttachError, match=r"float64.*supported"):
        hata.hf.attach(fresh("llama").double())
