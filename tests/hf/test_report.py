"""What a handle tells is what happened; what was planned and cannot be is said, or raised."""

import copy
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers import DynamicCache  # noqa: E402
from transformers.cache_utils import Cache, DynamicLayer  # noqa: E402

import hata  # noqa: E402
import hata.hf  # noqa: E402
from hata.hf import models, reasons  # noqa: E402

FEW = hata.Selection(bits=64, k=6, dense_layers=1, min_length=0)
CACHE = models.cache_argument(transformers.LlamaForCausalLM)


def decoded(model, ids, cache=None, steps=3, **kwargs):
    """A prompt and some steps in a loop of the user's own."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    model(ids, **{CACHE: cache}, **kwargs)
    for _ in range(steps):
        out = model(ids[:, :1], **{CACHE: cache}, **kwargs)
    return out.logits


def test_steps_are_counted_and_told_by_reason(tiny, prompts, answer):
    model = tiny("llama")
    middle = hata.Selection(bits=64, k=26, dense_layers=1, min_length=0)
    with hata.hf.attach(model, selection=middle) as handle:
        answer(model, prompts.of(1, 23))
    first, *others = handle.report().layers
    assert (first.selection, first.why, first.hashed) == (None, "its selection says so", 0)
    for layer in others:
        assert layer.selection == middle
        assert layer.hashed == 6
        assert layer.dense == {reasons.PREFILL: 1, reasons.SHORT: 3}
        assert not layer.captured
        assert not layer.compiled
    told = str(handle.report()).splitlines()
    assert told == [
        "  layers 0: dense: its selection says so",
        "  layers 1-2: 6 steps hashed; dense: 3 context within the budget, "
        "1 several tokens (prefill)",
    ]
    assert str(handle).splitlines()[-2:] == told


class Foreign(DynamicLayer):
    """A cache layer that nobody knows."""


class Half(Cache):
    """A cache that keeps its keys in another way."""

    def __init__(self, count):
        super().__init__(layers=[Foreign() for _ in range(count)])


def no_cache(model, ids):
    with torch.no_grad():
        model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False)


def recorded(model, ids):
    decoded(model, ids)


def foreign(model, ids):
    with torch.no_grad():
        decoded(model, ids, Half(3))


def holes(model, ids):
    mask = torch.ones((1, ids.shape[1] + 1), dtype=torch.long)
    mask[0, 5] = 0
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids, attention_mask=mask[:, :-1], **{CACHE: cache})
        model(ids[:, :1], attention_mask=mask, **{CACHE: cache})


UNPLANNED = {
    "no-cache": (no_cache, "no cache; generate with use_cache=True"),
    "gradients": (recorded, r"gradients are recorded; decode under torch\.no_grad"),
    "foreign-cache": (foreign, "a cache layer of another kind: Foreign"),
    "holes": (holes, "a mask that hides more than left padding"),
}


@pytest.mark.parametrize("kind", UNPLANNED)
def test_what_was_planned_and_cannot_be_is_said_once(kind, fresh, prompts, calls):
    run, why = UNPLANNED[kind]
    model, ids = fresh("llama"), prompts.of(1, 23)
    with hata.hf.attach(model, selection=FEW) as handle:
        with pytest.warns(UserWarning, match=f"LlamaForCausalLM: layer 1 was to be.*{why}") as seen:
            run(model, ids)
        assert len([one for one in seen if "was to be hashed" in str(one.message)]) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(model, ids)
    assert not calls
    for layer in handle.report().layers[1:]:
        assert not layer.hashed
        assert sum(layer.dense.values()) >= 2
    with (
        hata.hf.attach(model, selection=FEW, strict=True),
        pytest.raises(hata.AttachError, match=why),
    ):
        run(model, ids)


@pytest.mark.gpu
def test_an_offloaded_cache_stays_dense_and_says_so(fresh, prompts, calls):
    model, ids = fresh("llama").cuda(), prompts.of(1, 23).cuda()
    own = model.generate(ids, max_new_tokens=4, do_sample=False)
    with (
        hata.hf.attach(model, selection=FEW),
        pytest.warns(UserWarning, match="an offloaded cache"),
    ):
        got = model.generate(
            ids, max_new_tokens=4, do_sample=False, cache_implementation="offloaded"
        )
    assert torch.equal(own, got)
    assert not calls


def test_strict_says_nothing_where_all_is_as_planned(tiny, prompts, answer):
    with hata.hf.attach(tiny("llama"), selection=FEW, strict=True) as handle:
        answer(tiny("llama"), prompts.of(1, 23))
    assert [layer.hashed for layer in handle.report().layers] == [0, 9, 9]


def test_a_release_that_calls_attention_in_another_way_is_not_silent(tiny, prompts, monkeypatch):
    """Taken over and never called: it must be said, whatever the cause."""
    monkeypatch.setattr("hata.hf.intercept.Interception.watch", lambda self: None)
    with (
        torch.no_grad(),
        hata.hf.attach(tiny("llama"), selection=FEW),
        pytest.warns(UserWarning, match="never came through the attention interface"),
    ):
        decoded(tiny("llama"), prompts.of(1, 23))


def test_a_cache_is_found_whatever_its_argument_is_called(fresh, prompts, calls):
    model, ids = fresh("llama"), prompts.of(1, 23)
    inner = model.model.forward

    def renamed(*args, kv_store=None, **kwargs):
        return inner(*args, **{CACHE: kv_store}, **kwargs)

    model.model.forward = renamed
    with torch.no_grad(), hata.hf.attach(model, selection=FEW):
        cache = DynamicCache(config=model.config)
        for tokens in (ids, ids[:, :1], ids[:, :1]):
            model.model(tokens, kv_store=cache)
    assert len(calls) == 4


def test_threads_do_not_meet(tiny, prompts, answer, monkeypatch):
    """Eight prompts in four threads: what they give in turn, hashed as often."""
    model = tiny("llama")
    inputs = [
        prompts.padded(rows=2, tokens=n) if n % 2 else prompts.of(1, n)
        for n in (37, 52, 61, 80, 45, 90, 33, 70)
    ]
    count, lock = [0], threading.Lock()
    original = hata.hash_attend

    def counted(*args, **kwargs):
        with lock:
            count[0] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(hata, "hash_attend", counted)

    def generate(given):
        if not isinstance(given, dict):
            given = {"input_ids": given, "attention_mask": torch.ones_like(given)}
        return model.generate(**given, max_new_tokens=12, do_sample=False)

    with hata.hf.attach(model, selection=FEW, strict=True) as handle:
        in_turn = [generate(given) for given in inputs]
        alone = count[0]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(generate, inputs))
        told = [layer.hashed for layer in handle.report().layers]
    assert all(torch.equal(a, b) for a, b in zip(in_turn, together, strict=True))
    assert count[0] == 2 * alone == sum(told)
    assert told == [0, alone, alone]


def test_generations_take_turns(tiny, prompts):
    """Steps of two sequences, one after the other on one model: each as if it were alone."""
    model = tiny("llama")
    ids = [prompts.of(1, 30), prompts.of(2, 41)]

    def start(prompt):
        cache = DynamicCache(config=model.config)
        model(prompt, **{CACHE: cache})
        while True:
            yield model(prompt[:, :1], **{CACHE: cache}).logits

    with torch.no_grad(), hata.hf.attach(model, selection=FEW, strict=True):
        alone = [[next(steps) for _ in range(4)] for steps in map(start, ids)]
        running = [start(prompt) for prompt in ids]
        turns = [[next(steps) for steps in running] for _ in range(4)]
    for i in range(2):
        assert all(torch.equal(a, turn[i]) for a, turn in zip(alone[i], turns, strict=True))


def test_a_forward_pass_within_another(fresh, prompts, answer):
    """Another generation from within a layer of the first, on the same model."""
    model, ids = fresh("llama"), prompts.of(1, 30)
    with hata.hf.attach(model, selection=FEW, strict=True) as handle:
        own = answer(model, ids)
        inside = []

        def nested(module, args, kwargs):
            if not inside:
                inside.append(None)
                inside[0] = answer(model, ids)

        hook = model.model.layers[1].register_forward_pre_hook(nested, with_kwargs=True)
        got = answer(model, ids)
        hook.remove()
    assert torch.equal(own.logits, got.logits)
    assert torch.equal(own.logits, inside[0].logits)
    assert [layer.hashed for layer in handle.report().layers] == [0, 27, 27]


class Wrapper(torch.nn.Module):
    """As adapters of parameters wrap a model."""

    def __init__(self, **held):
        super().__init__()
        for name, module in held.items():
            setattr(self, name, module)


@pytest.mark.parametrize("kind", ["peft-like", "compiled", "data-parallel"])
def test_wrappers_are_reached_into(kind, fresh, prompts, answer):
    model = fresh("llama")
    wrapped = {
        "peft-like": lambda: Wrapper(base_model=Wrapper(model=model)),
        "compiled": lambda: torch.compile(model, backend="eager"),
        "data-parallel": lambda: torch.nn.DataParallel(model),
    }[kind]()
    with hata.hf.attach(wrapped, selection=FEW) as handle:
        answer(model, prompts.of(1, 23))
    assert [layer.hashed for layer in handle.report().layers] == [0, 9, 9]
    hata.hf.attach(wrapped, selection=FEW)
    hata.hf.detach(wrapped)
    hata.hf.detach(wrapped)


def test_a_wrapper_of_several_models_is_told_what_to_pass(fresh):
    both = Wrapper(policy=fresh("llama"), reward=fresh("qwen3"))
    expected = r"pass one of \.policy \(LlamaForCausalLM\), \.reward \(Qwen3ForCausalLM\)"
    with pytest.raises(hata.AttachError, match=expected):
        hata.hf.attach(both)


def test_check_compares_every_way(fresh):
    found = hata.hf.check_model(fresh("llama"))
    assert [(one.way, one.hashed, one.note) for one in found] == [
        ("dynamic", 9, ""),
        ("static", 9, ""),
        ("left padding", 9, ""),
    ]


@pytest.mark.parametrize("how", ["asked", "untested"])
def test_check_names_the_layer_where_a_difference_begins(how, fresh, monkeypatch):
    """An attention that does more than its arguments say."""
    model = fresh("llama")
    before = copy.deepcopy(model.config._attn_implementation)
    home = transformers.models.llama.modeling_llama
    own = home.eager_attention_forward

    def more(module, query, key, value, *args, **kwargs):
        out, weights = own(module, query, key, value, *args, **kwargs)
        return out * (1.5 if module.layer_idx == 1 else 1.0), weights

    more.__module__ = own.__module__
    monkeypatch.setattr(home, "eager_attention_forward", more)
    model.set_attn_implementation("eager")
    given = {"check": True} if how == "asked" else {}
    if how == "untested":
        monkeypatch.setattr(models, "TESTED", frozenset())
    with pytest.raises(hata.AttachError, match=r"check: LlamaForCausalLM, dynamic: .*from layer 1"):
        hata.hf.attach(model, **given)
    assert "_hata_handle" not in vars(model.model)
    model.set_attn_implementation(before)


def test_a_part_that_cannot_be_checked_is_told(fresh, monkeypatch):
    monkeypatch.setattr(models, "TESTED", frozenset())
    with pytest.warns(UserWarning, match="not tested, and cannot be checked"):
        hata.hf.attach(fresh("llama").model, selection=FEW).detach()


def test_check_leaves_a_model_in_training_as_it_was(fresh):
    model = fresh("llama").train()
    model.model.layers[0].eval()
    hata.hf.check_model(model)
    assert model.training
    assert not model.model.layers[0].training


@pytest.fixture
def saved(fresh, tmp_path):
    """A folder with a tiny model."""
    fresh("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_command_checks_a_model(saved, capsys):
    from hata import cli

    assert cli.main(["check", "--model", str(saved), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{way:13} equal; 9 steps of layers ran hash attention"
        for way in ("dynamic", "static", "left padding")
    ]


def test_the_command_tells_what_differs_in_a_line(saved, capsys, monkeypatch):
    from hata import cli

    # No error is small enough.
    monkeypatch.setattr("hata.hf.model_check._TOLERANCE", {torch.float32: -1.0})
    assert cli.main(["check", "--model", str(saved), "--device", "cpu"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("hata check: error: check: LlamaForCausalLM, dynamic: hash attention")
    assert "from layer 0 on" in told
    assert told.count("\n") == 1
