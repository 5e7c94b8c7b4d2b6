"""Steps from CUDA graphs: on a CPU with a stand-in that runs what would be replayed."""

import copy
import functools
import weakref

import pytest
import torch
import transformers
from transformers import DynamicCache

import hata
import hata.hf
from hata.hf import cache_steps, compiled_pieces, reasons, step_graph

ALL = hata.Selection(bits=64, k=4096, dense_layers=0)
FEW = hata.Selection(bits=64, k=16, dense_layers=1)


class Again:
    """What a graph is on a CPU: the step itself."""

    def __init__(self, step, device):
        self.replay = step


@pytest.fixture(autouse=True)
def graphs_on_a_cpu(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(cache_steps, "capture", Again)
        monkeypatch.setattr(step_graph, "KINDS", ("cpu",))
        monkeypatch.setattr(compiled_pieces, "compiled", lambda function, **_: function)


@pytest.fixture
def model(fresh):
    made = fresh("llama")
    return made.cuda() if torch.cuda.is_available() else made


@pytest.fixture
def ids(prompts):
    def of(rows, length):
        made = prompts.of(rows, length)
        return made.cuda() if torch.cuda.is_available() else made

    return of


def tokens(model, ids, count=24, **kwargs):
    kwargs = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, **kwargs}
    return model.generate(ids, **kwargs)


@pytest.mark.parametrize("selection", [ALL, FEW, None])
def test_steps_are_those_of_eager_steps(model, ids, selection):
    with hata.hf.attach(model, selection=selection, graphs=False) as handle:
        expected = tokens(model, ids(2, 60))
        assert handle.report().steps == hata.hf.layer_report.Steps()
    with hata.hf.attach(model, selection=selection) as handle:
        assert torch.equal(tokens(model, ids(2, 60)), expected)
        # The first step over a room is no replay.
        assert handle.report().steps == hata.hf.layer_report.Steps(22, 1)
    if selection is ALL:
        for layer in handle.report().layers:
            assert layer.hashed == 23
            assert layer.replayed == 22


def test_all_dense_is_the_model_itself(model, ids):
    expected = tokens(model, ids(2, 60))
    with hata.hf.attach(model, selection=None) as handle:
        assert torch.equal(tokens(model, ids(2, 60)), expected)
    assert "dense: its selection says so" in str(handle.report())
    assert "22 steps by 1 CUDA graphs" in str(handle.report())


def test_a_room_that_is_full_is_doubled(model, ids):
    expected = tokens(model, ids(1, 100), 140, max_length=None)
    with hata.hf.attach(model, selection=ALL) as handle:
        assert torch.equal(tokens(model, ids(1, 100), 140), expected)
    assert handle.report().steps.captured == 1
    with hata.hf.attach(model, selection=ALL) as handle:
        longer = tokens(model, ids(1, 250), 16)
    assert handle.report().steps.captured == 2
    assert handle.report().steps.eager == {reasons.NO_ROOM: 1}
    assert torch.equal(longer, tokens(model, ids(1, 250), 16))


def test_left_padding(model, ids):
    x = ids(2, 40)
    x[0, :15] = 0
    kwargs = {"attention_mask": (x != 0).long()}
    expected = tokens(model, x, **kwargs)
    for selection in (ALL, None):
        with hata.hf.attach(model, selection=selection) as handle:
            assert torch.equal(tokens(model, x, **kwargs), expected)
        assert handle.report().steps.replayed == 22


def test_a_cache_is_what_it_is_without_graphs(model, ids):
    x = ids(1, 60)
    with torch.no_grad(), hata.hf.attach(model, selection=ALL) as handle:
        got = tokens(model, x, return_dict_in_generate=True)
        cache = next(one for one in got.values() if isinstance(one, step_graph.Cache))
        assert cache.get_seq_length() == 83
        assert cache.layers[0].keys.shape[2] == cache.layers[2].values.shape[2] == 83
        twin = copy.deepcopy(cache)
        name = hata.hf.models.cache_argument(model)
        # A next turn, a branch of it, and one that begins earlier.
        turn = torch.cat([got.sequences, ids(1, 5)], 1)
        expected = tokens(model, turn)
        assert torch.equal(tokens(model, turn, **{name: cache}), expected)
        assert torch.equal(tokens(model, turn, **{name: twin}), expected)
        cache.crop(-(cache.get_seq_length() - 40))
        assert torch.equal(tokens(model, x, **{name: cache}), got.sequences)
        assert handle.report().steps.captured >= 4


@pytest.mark.parametrize("by_reference", [False, True])
def test_keys_that_somebody_writes_are_seen(model, ids, by_reference):
    x = ids(1, 60)
    answers = []
    for graphs in (False, True):
        with torch.no_grad(), hata.hf.attach(model, selection=FEW, graphs=graphs):
            got = tokens(model, x, return_dict_in_generate=True)
            cache = next(one for one in got.values() if isinstance(one, step_graph.Cache))
            name = hata.hf.models.cache_argument(model)
            held = [layer.keys for layer in cache.layers]
            model(got.sequences[:, -1:], **{name: cache})
            # By a reference from before the last step, or through the cache.
            for keys in held if by_reference else [layer.keys for layer in cache.layers]:
                keys[:, :, 10:20] *= -3
            more = torch.cat([got.sequences, got.sequences[:, -1:]], 1)
            answers.append(tokens(model, more, **{name: cache}))
    assert torch.equal(*answers)


def loop(model, x, steps=12, between=None, given=None, mask=None):
    """Logits of greedy steps, by calls of the model."""
    name = hata.hf.models.cache_argument(model)
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad():
        prefill = {} if mask is None else {"attention_mask": mask}
        logits = model(input_ids=x, **{name: cache}, **prefill).logits
        for i in range(steps):
            if between is not None:
                between(i, cache)
            more = given(i) if given else {}
            output = model(input_ids=logits[:, -1:].argmax(-1), **{name: cache}, **more)
            logits = output[0] if more.get("return_dict") is False else output.logits
            found.append(logits.clone())
    return torch.stack(found)


def cut_a_layer(i, cache):
    if i == 0:
        layer = cache.layers[1]
        layer.keys, layer.values = (x[:, :, :-10].contiguous() for x in (layer.keys, layer.values))


def write_after_the_first_step(i, cache):
    if i == 1:
        for layer in cache.layers:
            layer.keys[:, :, 10:40].mul_(-3)


def reset(i, cache):
    if i == 6:
        cache.reset()


def window(i):
    """The oldest keys leave, by the mask."""
    mask = torch.ones(2, 61 + i, dtype=torch.long)
    mask[:, : 4 * i] = 0
    return {"attention_mask": mask, "position_ids": torch.full((2, 1), 60 + i)}


def late_mask(i):
    mask = torch.ones(2, 61 + i, dtype=torch.long)
    mask[0, :7] = 0
    more = {"position_ids": torch.full((2, 1), 60 + i)}
    return {**more, "attention_mask": mask} if i > 3 else more


def to(device, given):
    return lambda i: {
        n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in given(i).items()
    }


@pytest.mark.parametrize("selection", [FEW, None])
@pytest.mark.parametrize(
    ("between", "given"),
    [
        (None, lambda i: {"return_dict": False}),
        (None, lambda i: {"labels": torch.zeros(2, 1, dtype=torch.long)} if i == 5 else {}),
        (None, window),
        (None, late_mask),
        (cut_a_layer, None),
        (write_after_the_first_step, None),
        (reset, None),
    ],
)
def test_loops_of_ones_own(model, ids, selection, between, given):
    given = given and to(model.device, given)
    answers = []
    for graphs in (False, True):
        with hata.hf.attach(model, selection=selection, graphs=graphs) as handle:
            answers.append(loop(model, ids(2, 60), between=between, given=given))
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)
    if between is reset or given is None:
        return
    steps = handle.report().steps
    assert steps.replayed or steps.eager


def test_graphs_go_on_after_a_step_that_none_can_run(model, ids):
    wrong = torch.full((2, 1), 1000, device=model.device)
    name = hata.hf.models.cache_argument(model)
    with torch.no_grad(), hata.hf.attach(model, selection=ALL) as handle:
        cache = DynamicCache(config=model.config)
        model(input_ids=ids(2, 60), **{name: cache})
        if model.device.type == "cpu":  # a GPU is lost by it
            with pytest.raises(IndexError):
                model(input_ids=wrong, **{name: cache})
        token = ids(2, 1)
        model(input_ids=token, **{name: cache}, labels=token)
        for _ in range(6):
            model(input_ids=token, **{name: cache})
        assert handle.report().steps.replayed >= 4
        # Turns that are answered in one word, then one that is not.
        for _ in range(6):
            model(input_ids=ids(2, 5), **{name: cache})
            model(input_ids=token, **{name: cache})
        before = handle.report().steps.replayed
        for _ in range(4):
            model(input_ids=token, **{name: cache})
        assert handle.report().steps.replayed == before + 4


def test_a_used_cache_goes_on_under_another_attachment(model, ids):
    name = hata.hf.models.cache_argument(model)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        with hata.hf.attach(model, selection=ALL):
            model(input_ids=ids(2, 60), **{name: cache})
            for _ in range(4):
                model(input_ids=ids(2, 1), **{name: cache})
        with hata.hf.attach(model, selection=FEW) as handle:
            for _ in range(6):
                model(input_ids=ids(2, 1), **{name: cache})
        assert handle.report().steps.replayed == 4
        assert handle.report().steps.eager == {reasons.FIRST: 1}


def test_positions_that_follow_from_a_mask(fresh, prompts):
    kwargs = {"ffn_dim": 48, "word_embed_proj_dim": 64}
    sizes = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(1)
    config = transformers.OPTConfig(**sizes, **kwargs, init_std=0.3)
    model = transformers.OPTForCausalLM(config).eval()
    x = prompts.of(2, 40)
    x[0, :15] = 0
    mask = (x != 0).long()

    def given(i):
        return {"attention_mask": torch.cat([mask, torch.ones(2, i + 1, dtype=torch.long)], 1)}

    expected = loop(model, x, given=given, mask=mask)
    with hata.hf.attach(model, selection=None, check=False):
        torch.testing.assert_close(loop(model, x, given=given, mask=mask), expected)


def test_what_is_given_out_is_not_written_over(model, ids, monkeypatch):
    if model.device.type == "cpu":
        static = {}

        class Static(Again):
            """One output for all steps, as a graph has."""

            def __init__(self, step, device):
                def replay():
                    made = step()
                    for name, x in made.items():
                        if isinstance(x, torch.Tensor):
                            static.setdefault(name, x.clone()).copy_(x)
                            made[name] = static[name]
                    return made

                self.replay = replay

        monkeypatch.setattr(cache_steps, "capture", Static)
    name = hata.hf.models.cache_argument(model)
    with torch.no_grad(), hata.hf.attach(model, selection=ALL):
        cache = DynamicCache(config=model.config)
        model(input_ids=ids(2, 60), **{name: cache})
        outputs = [model(input_ids=ids(2, 1) + i, **{name: cache}).logits for i in range(5)]
        kept = [x.clone() for x in outputs]
        model(input_ids=ids(2, 1), **{name: cache})
    assert all(map(torch.equal, outputs, kept))
    assert len({x.sum().item() for x in outputs}) == 5


def test_a_detached_model_is_itself_though_its_forward_is_wrapped(model, ids):
    expected = loop(model, ids(2, 60))
    handle = hata.hf.attach(model, selection=None)
    own = model.forward
    model.forward = functools.wraps(own)(lambda *args, **kwargs: own(*args, **kwargs))
    got = loop(model, ids(2, 60), between=lambda i, cache: i == 5 and handle.detach())
    del model.forward
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_what_was_left_is_let_go(model, ids):
    class Once:
        def __init__(self, step, device):
            self.output = step()

        def replay(self):
            return self.output

    name = hata.hf.models.cache_argument(model)
    with (
        torch.no_grad(),
        hata.hf.attach(model, selection=FEW),
        pytest.MonkeyPatch.context() as patch,
    ):
        if model.device.type == "cpu":
            patch.setattr(cache_steps, "capture", Once)
        cache = DynamicCache(config=model.config)
        model(input_ids=ids(2, 60), **{name: cache})
        for _ in range(4):
            model(input_ids=ids(2, 1), **{name: cache})
        left = [weakref.ref(layer._buffers[0]._buffer) for layer in cache.layers]
        model(input_ids=ids(2, 300), **{name: cache})
        assert [one() for one in left] == [None] * 3


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"output_hidden_states": True}])
def test_steps_that_no_graph_runs(model, ids, kwargs):
    kwargs = {**kwargs, "return_dict_in_generate": True}
    expected = tokens(model, ids(1, 40), **kwargs).sequences
    with hata.hf.attach(model, selection=ALL) as handle:
        assert torch.equal(tokens(model, ids(1, 40), **kwargs).sequences, expected)
    assert handle.report().steps.eager


def test_masks_with_holes_run_without(model, ids):
    mask = torch.ones_like(ids(1, 40))
    mask[0, 10:12] = 0
    expected = tokens(model, ids(1, 40), attention_mask=mask)
    with hata.hf.attach(model, selection=FEW) as handle:
        with pytest.warns(UserWarning, match="a mask that hides more than left padding"):
            assert torch.equal(tokens(model, ids(1, 40), attention_mask=mask), expected)
        assert reasons.HOLES in handle.report().steps.eager


def test_a_step_that_fails_to_be_captured_runs_without(model, ids, monkeypatch):
    def fails(step, device):
        raise RuntimeError("operation not permitted when stream is capturing\nat x")

    monkeypatch.setattr(cache_steps, "capture", fails)
    expected = tokens(model, ids(1, 40))
    with hata.hf.attach(model, selection=ALL) as handle:
        assert torch.equal(tokens(model, ids(1, 40)), expected)
    (why,) = set(handle.report().steps.eager) - {reasons.FIRST}
    assert why == "capture fails: operation not permitted when stream is capturing"


def test_hooks_that_come_with_a_step_are_called(model, ids):
    seen = []

    def between(i, cache):
        if i == 6:
            model.get_decoder().layers[1].register_forward_hook(lambda *_: seen.append(1))

    with hata.hf.attach(model, selection=ALL):
        loop(model, ids(2, 60), between=between)
    assert len(seen) == 6


def test_hooks_are_called(model, ids):
    seen = []
    with hata.hf.attach(model, selection=ALL) as handle:
        hook = model.get_decoder().layers[1].register_forward_hook(lambda *_: seen.append(1))
        expected = tokens(model, ids(1, 40))
        assert len(seen) == 24
        hook.remove()
        assert torch.equal(tokens(model, ids(1, 40)), expected)
    assert handle.report().steps.eager == {reasons.HOOKS: 23}
    assert handle.report().steps.replayed == 22


def test_weights_that_move_are_followed(model, ids):
    name = hata.hf.models.cache_argument(model)
    with torch.no_grad(), hata.hf.attach(model, selection=ALL) as handle:
        got = tokens(model, ids(1, 40), return_dict_in_generate=True)
        cache = next(one for one in got.values() if isinstance(one, step_graph.Cache))
        twin = copy.deepcopy(cache)
        for weight in model.parameters():
            weight.data = weight.data * 0.5
        after = tokens(model, got.sequences, **{name: cache})
        assert torch.equal(after, tokens(model, got.sequences, **{name: twin}))
    assert handle.report().steps.captured == 3


def test_pieces_that_cannot_be_compiled_run_as_they_are(model, ids, monkeypatch):
    def compiled(function, **_):
        def fails(*args):
            raise RuntimeError("no compiler")

        return fails

    monkeypatch.setattr(compiled_pieces, "compiled", compiled)
    expected = tokens(model, ids(1, 40))
    with hata.hf.attach(model, selection=None) as handle:
        assert torch.equal(tokens(model, ids(1, 40)), expected)
    assert handle.report().steps == hata.hf.layer_report.Steps(22, 1)


def test_a_copy_of_a_model_has_graphs_of_its_own(model, ids):
    with hata.hf.attach(model, selection=ALL) as handle:
        copied = copy.deepcopy(model)
        expected = tokens(model, ids(1, 40))
        before = handle.report().steps
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(0.5)
        other = tokens(copied, ids(1, 40))
        assert not torch.equal(other, expected)
        assert handle.report().steps == before
    assert torch.equal(tokens(copied, ids(1, 40)), other)
    hata.hf.detach(copied)
    assert "forward" not in vars(copied)
    assert "forward" not in vars(model)
