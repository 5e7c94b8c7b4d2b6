"""`hata eval`: every way of choosing keys against its definition, tasks, and the command."""

import errno
import os
import sys
import types

import numpy as np
import pytest
import torch
import transformers

import hata
from hata import cli
from hata.calibration import recorder
from hata.calibration.hashable import dense_layers
from hata.encoder import Encoder
from hata.errors import CaptureError
from hata.evaluate import decoding, harness, report, retained, tasks
from hata.evaluate.command import parse_places
from hata.evaluate.mass import hidden_keys
from hata.evaluate.selectors import Asked, Coded, Exact, Pages, Window, lowest_first
from hata.hf.models import LATENT

KV, G, Q, S, D = 2, 2, 5, 90, 16


def encode(text):
    return [byte + 3 for byte in text.encode()]


@pytest.fixture(scope="module")
def asked():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn((KV, G, Q, D), generator=generator)
    keys = torch.randn((KV, S, D), generator=generator)
    return Asked(1, q, keys, hidden_keys(Q, S, keys))


KINDS = [
    "query projection", "codes per query head", "several codes per query head", "networks",
    "key norms",
]  # fmt: skip


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_choose_what_the_ops_choose(asked, encoders, kind, bits):
    """Exactly: the same keys as `hata.encode` and `hata.hamming_topk`."""
    from hata.hf.layer_plan import LayerPlan
    from hata.selection import Selection

    encoder = encoders[kind]
    placed = LayerPlan(encoder, 1, Selection(bits=bits, k=1)).on(asked.keys)
    keys, q = asked.keys[None].contiguous(), asked.q.flatten(0, 1)[None].contiguous()
    norms = torch.empty((1, KV, S), dtype=torch.float16) if encoder.key_norms else None
    k_codes = placed.encode_keys(keys, norms=norms)
    q_codes = placed.query_codes(q)
    if q_codes is None:
        options = placed.attend_options
        q_codes = hata.encode(q, options["query_projection"], options["query_bias"])
    expected = hata.hamming_topk(q_codes, k_codes, 9, key_norms=norms)[0]
    found = Coded("x", encoder, bits).choose(asked, 9).sort(-1).values
    assert torch.equal(found.int(), expected)


def test_keys_hashed_per_query_head_add_up(asked, encoders):
    """The score of a group is the sum over its heads, each with its own codes of the keys."""
    encoder = encoders["keys per query head"]
    scores = Coded("x", encoder).scores(asked)
    from hata.hf.layer_plan import LayerPlan
    from hata.selection import Selection

    placed = LayerPlan(encoder, 1, Selection(bits=64, k=1)).on(asked.keys)
    q = placed.query_signs(asked.q.flatten(0, 1)[None])[0]
    k = placed.key_signs(asked.keys[None])[0]
    for head in range(KV):
        expected = sum(q[h] @ k[h].T for h in range(head * G, (head + 1) * G))
        torch.testing.assert_close(scores[head], expected)


def test_exact_pages_and_window(asked):
    chosen = Exact().choose(asked, 7)
    totals = asked.q.sum(1) @ asked.keys.mT
    for head, query in np.ndindex(KV, Q):
        seen = S - (Q - 1 - query)
        best = totals[head, query, :seen].topk(7).indices
        assert set(chosen[head, query].tolist()) == set(best.tolist())

    chosen = Pages(8).choose(asked, 16)
    assert chosen.shape == (KV, Q, 16)
    for head in range(KV):
        bounds = []
        for start in range(0, S, 8):
            page = asked.keys[head, start : start + 8]
            ends = torch.stack([page.amin(0), page.amax(0)])
            # A group's bound is the sum of its heads'.
            each = (asked.q[head, :, -1, None] * ends).amax(1).sum()
            bounds.append(float(each))
        best = np.argsort(bounds)[-2:]
        pages = {int(i) // 8 for i in chosen[head, -1]}
        assert pages == set(best.tolist())

    chosen = Window(2).choose(asked, 6)
    assert chosen[1, -1].tolist() == [0, 1, 86, 87, 88, 89]
    assert chosen[1, 0].tolist() == [0, 1, 82, 83, 84, 85]


def test_of_equals_the_lowest_positions():
    scores = torch.tensor([[[3.0, 1, 3, 3, 2, 3]]])
    assert lowest_first(scores, 3).tolist() == [[[0, 2, 3]]]
    assert lowest_first(torch.zeros(2, 1, 5), 2).tolist() == [[[0, 1]], [[0, 1]]]


def test_measured_mass(asked, encoders):
    names = [Exact(), Coded("all", encoders["query projection"]), Window(0)]
    found = retained.measure(asked, 0.25, names, [S, 6])
    mass, exact, recall = found["exact top-k", 0, 6]
    assert mass == exact
    assert recall == 1
    everything = found["all", 64, S]
    assert everything == pytest.approx((1, 1, 1), abs=1e-5)
    mass, exact, recall = found["0 first and the last (StreamingLLM)", 0, 6]
    assert mass < exact
    kept = 0.0
    for head, query in np.ndindex(KV, Q):
        seen = S - (Q - 1 - query)
        logits = 0.25 * asked.q[head, :, query] @ asked.keys[head, :seen].T
        kept += float(logits.softmax(-1).mean(0)[-6:].sum()) / (KV * Q)
    assert mass == pytest.approx(kept, rel=1e-4)


def test_no_key_counts_twice_where_a_query_sees_few(asked):
    """Budgets above what the first queries see, and pages that reach behind the last key."""
    few = asked._replace(keys=asked.keys[:, :17], hidden=hidden_keys(Q, 17, asked.keys[:, :17]))
    names = [Exact(), Pages(8), Window(4)]
    for (name, _, k), (mass, exact, recall) in retained.measure(few, 0.25, names, [15, 17]).items():
        assert mass <= 1 + 1e-5, name
        assert exact <= 1 + 1e-5
        assert recall <= 1
        if k == 17:
            assert (mass, recall) == pytest.approx((1, 1), abs=1e-5)


def test_a_broken_model_is_named(tiny):
    model = recorder.load_model(tiny, "cpu")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    ids = np.random.default_rng(0).integers(3, 259, (1, 64))
    with pytest.raises(CaptureError, match="layer 1: queries or keys are not finite"):
        retained.evaluate(model, ids, [Exact()], [8], queries=4)


def test_a_models_layers_are_measured_while_it_reads(tiny):
    model = recorder.load_model(tiny, "cpu")
    ids = np.random.default_rng(0).integers(3, 259, (2, 128))
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    random = Encoder.random({**config, "head_dim": 16}, 64)
    half = Encoder(random.shape, 64, (None, random.projections[1]))
    found = retained.evaluate(
        model, ids, [Exact(), Coded("half", half)], [8], queries=16, on_sequence=lambda _: None
    )
    exact, coded = found
    assert set(exact.kept.values()) == set(exact.recall.values()) == {1}
    assert list(exact.kept) == [0, 1]
    assert list(coded.kept) == [1]
    assert 0 < coded.kept[1] < 1.2
    assert "| exact top-k | - | 1.0000 |" in report.retained_tables(found)


def test_means_are_over_the_layers_that_all_rows_have():
    """A row that lacks a bad layer is no better for it."""
    whole = retained.Kept("whole", 64, 128, 8, *[{0: 0.25, 1: 0.5, 2: 0.75, 3: 0.25}] * 3)
    some = retained.Kept("some", 64, 128, 8, *[{1: 0.5, 2: 0.75}] * 3)
    told = report.retained_tables([whole, some])
    assert told.count("mean over layers 1-2, those of 0-3 that all rows have") == 2
    for name in ("whole", "some"):
        assert told.count(f"| {name} | 64 | 0.6250 |") == 2
    assert "| some | 64 | - | 0.500 | 0.750 | - |" in told
    assert "mean over layers 0-3:" in report.retained_tables([whole])
    other = retained.Kept("other", 64, 128, 8, *[{0: 0.5}] * 3)
    told = report.retained_tables([some, other])
    assert "no means to compare" in told
    assert "| other | 64 | 0.500 | - | - |" in told


def test_a_plot_of_rows_that_share_no_layer(tmp_path):
    found = [retained.Kept(f"row {i}", 64, 128, 8, *[{i: 0.5}] * 3) for i in range(2)]
    assert report.plot(tmp_path / "mass.png", found)
    assert report.plot(tmp_path / "mass.png", found[:1])


@pytest.mark.parametrize("task", tasks.TASKS)
def test_prompts_hold_their_answers(task):
    text = "some_code = other_code(1, 2)\n" * 200
    made = list(tasks.prompts(task, encode, text, 1500, 5, pairs=4, seed=3))
    assert len(made) == 5
    assert made == list(tasks.prompts(task, encode, text, 1500, 5, pairs=4, seed=3))
    for prompt in made:
        assert len(prompt.tokens) == 1500
        whole = bytes(token - 3 for token in prompt.tokens).decode()
        if task == "frequency":
            assert whole.count(f"\n{prompt.value}()") == 6
            assert whole.endswith('\nmost_called = "')
            continue
        assert whole.endswith(f'\nassert {prompt.name} == "')
        if task == "tracking":
            name = prompt.name
            for _ in range(2):
                (line,) = [x for x in whole.split("\n") if x.startswith(f"{name} = ")]
                name = line.split(" = ")[1]
            assert f'\n{name} = "{prompt.value}"\n' in whole
        else:
            assert f'\n{prompt.name} = "{prompt.value}"\n' in whole
    if task == "multi-needle":
        second = bytes(token - 3 for token in made[1].tokens).decode()
        assert f'assert {made[0].name} == "{made[0].value}"\nassert {made[1].name}' in second


@pytest.mark.parametrize(
    ("length", "text", "expected"), [(60, "x" * 500, "length"), (500, "x" * 50, "text")]
)
def test_prompts_without_room(length, text, expected):
    with pytest.raises(ValueError, match=f"{expected}: got"):
        list(tasks.needles(encode, text, length, 1))
    with pytest.raises(ValueError, match="task: got 'other'"):
        list(tasks.prompts("other", encode, text, length, 1))


@pytest.fixture(scope="module")
def model(tiny):
    return recorder.load_model(tiny, "cpu")


def test_all_keys_decode_as_dense_attention(model, encoders):
    """With a budget of everything, every way gives the dense answer and the dense loss."""
    ids = torch.randint(3, 259, (3, 40), generator=torch.Generator().manual_seed(0))
    policy = decoding.Policy(1.0, 0, 0, 0, 64)
    ways = [decoding.dense(), decoding.simulated(model, Exact(), policy),
            decoding.simulated(model, Window(2), policy)]  # fmt: skip
    ways += [decoding.attached(name, model, one, 32, policy) for name, one in encoders.items()]
    found = decoding.answers(model, ids, ways, 4)
    assert len(found) == 9
    assert all(answer == found["dense", 0] for answer in found.values())
    nats = decoding.losses(model, ids, ways, 8)
    with torch.inference_mode():
        logged = model(ids).logits[:, -9:-1].log_softmax(-1)
    expected = -float(logged.gather(2, ids[:, -8:, None]).mean())
    assert all(x == pytest.approx(expected, rel=1e-4) for x in nats.values())


def test_a_small_budget_decodes_otherwise(model, encoders):
    ids = torch.randint(3, 259, (2, 120), generator=torch.Generator().manual_seed(0))
    policy = decoding.Policy(0.1, 1, 2, 3, 128)
    encoder = encoders["several codes per query head"]
    attached = decoding.attached("attached", model, encoder, 64, policy)
    simulated = decoding.simulated(model, Coded("simulated", encoder), policy)
    nats = decoding.losses(model, ids, [decoding.dense(), attached, simulated], 6)
    assert nats["attached", 64] == pytest.approx(nats["simulated", 64], rel=1e-4)
    assert abs(nats["attached", 64] - nats["dense", 0]) > 1e-3
    assert model.config._attn_implementation == "sdpa"


def test_the_command(tiny, text, encoders, tmp_path, capsys):
    path = tmp_path / "ours.safetensors"
    encoders["several codes per query head"].save(path)
    words = ["eval", "--model", str(tiny), "--text", str(text), "--encoder", f"ours={path}"]
    words += ["--bits", "32", "64", "--at", "256:8,16", "300", "--sequences", "2", "--queries"]
    words += ["16", "--tasks", "needle", "--prompts", "2", "--perplexity", "3", "--device", "cpu"]
    words += ["--sink", "1", "--recent", "2"]
    assert cli.main([*words, "--out", str(tmp_path / "report")]) == 0
    told = capsys.readouterr().out
    written = (tmp_path / "report" / "report.md").read_text()
    assert written == told
    rows = [line.split(" | ") for line in told.splitlines() if line.startswith("| ours")]
    # A model that knows only where codes may be cut has all of them at their own width.
    assert {row[1] for row in rows} == {"64"}
    for name in ("exact top-k", "pages of 16 (Quest)", "random hash", "StreamingLLM"):
        assert name in told
    assert "| 8 of 256 | 16 of 256 | 4 of 300 | 9 of 300 |" in told
    assert "/2 |" in told
    assert "+0.00%" in told
    assert (tmp_path / "report" / "mass.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--at", "100:x"], "such as 4096:64,128"),
        (["--at", "100:200"], "budgets of no more keys"),
        (["--tasks", "sums"], "expected some of needle"),
        (["--at", "999999"], "expected at most 4096, the model's limit"),
        (["--sequences", "0"], "--sequences: got 0, expected 1 or more"),
        (["--queries", "-5"], "--queries: got -5"),
        (["--prompts", "-3"], "--prompts: got -3"),
        (["--perplexity", "-5"], "--perplexity: got -5"),
        (["--perplexity", "255", "--at", "256:32"], "expected at most 254 of 256 tokens"),
        (["--batch", "-1"], "--batch: got -1"),
        (["--dense-layers", "-1"], "--dense-layers: got -1"),
        (["--bits", "0", "64"], "--bits: got 0, expected a positive multiple of 32"),
        (["--tasks", "needle", "--at", "256:16"], "expected no more than the budget of 16"),
        (["--tasks", "needle", "--at", "128:32"], "--tasks needle: length: got 128 tokens"),
        (["--methods"], "nothing is compared"),
        (["--no-mass"], "nothing to measure"),
        (["--tasks", "needle", "tracking", "--at", "512:32"], "--tasks tracking: length: got 512"),
        (["--sequences", "99"], "expected at least 405504 for 99"),
        (["--device", "nonsense"], "--device: got 'nonsense', expected auto, cpu, cuda or cuda:N"),
        (["--device", "cpu:7"], "--device: got 'cpu:7', expected auto"),
        (["--device", "spread"], "--device: got 'spread', expected auto"),
        (["--out", "/dev/null/report"], "cannot be made a folder"),
        (["--encoder", "none.safetensors"], "--encoder: got none.safetensors, which is not a file"),
        (["--dataset", "python"], "--text and --dataset: got both"),
    ],
)
def test_faults_are_named_before_anything_is_measured(
    tiny, text, capsys, monkeypatch, more, expected
):
    monkeypatch.setattr(recorder, "load_model", None)
    words = ["eval", "--model", str(tiny), "--text", str(text), "--device", "cpu"]
    assert cli.main([*words, *more]) == 2
    told = capsys.readouterr()
    assert expected in told.err
    assert told.err.startswith("hata eval: error: --")
    assert told.err.count("\n") == 1
    assert not told.out


def test_a_fault_in_a_file_is_none_of_the_command_line(tiny, text, tmp_path, capsys):
    words = ["eval", "--model", str(tiny), "--text", str(text), "--device", "cpu"]
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    assert cli.main([*words, "--encoder", str(tmp_path / "torn.safetensors")]) == 1
    assert "torn.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--dtype", "--out", "--encoder"])
def test_values_that_argparse_refuses(tiny, text, capsys, option):
    value = {"--dtype": "bogus"}.get(option, "")
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", "--model", str(tiny), "--text", str(text), option, value])
    assert stop.value.code == 2
    assert f"hata eval: error: argument {option}: " in capsys.readouterr().err


def test_what_was_measured_is_told_before_anything_fails(tiny, text, tmp_path, capsys, monkeypatch):
    def fails(*_):
        raise CaptureError("planted failure")

    monkeypatch.setattr(decoding, "losses", fails)
    words = ["eval", "--model", str(tiny), "--text", str(text), "--device", "cpu", "--at"]
    words += ["256:32", "--sequences", "1", "--perplexity", "3", "--bits", "32"]
    assert cli.main([*words, "--out", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert "planted failure" in told.err
    assert "Mass kept" in told.out
    assert (tmp_path / "report.md").read_text() == told.out


def test_a_full_disk_leaves_the_old_report(tiny, text, tmp_path, capsys, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    file = tmp_path / "report.md"
    file.write_text("old")
    words = ["eval", "--model", str(tiny), "--text", str(text), "--device", "cpu", "--at", "256"]
    assert cli.main([*words, "--sequences", "1", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert told == f"hata eval: error: [Errno 28] No space left on device: '{file}'\n"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("names", "told"),
    [(["", ""], "got 'one'"), (["a=", "a="], "got 'a'"), (["dense="], "got 'dense'")],
)
def test_every_row_has_a_name_of_its_own(tiny, text, encoders, tmp_path, capsys, names, told):
    paths = [tmp_path / str(i) / "one.safetensors" for i, _ in enumerate(names)]
    for path in paths:
        path.parent.mkdir()
        encoders["query projection"].save(path)
    words = ["eval", "--model", str(tiny), "--text", str(text), "--device", "cpu", "--encoder"]
    words += [f"{name}{path}" for name, path in zip(names, paths, strict=True)]
    assert cli.main(words) == 2
    assert f"{told} for" in capsys.readouterr().err


def test_latent_attention_is_not_decoded(latent, text, capsys):
    words = ["eval", "--model", str(latent), "--text", str(text), "--device", "cpu", "--no-mass"]
    assert cli.main([*words, "--perplexity", "4", "--at", "128:32", "--sequences", "2"]) == 2
    assert f"no layer of DeepseekV3ForCausalLM can be hashed: {LATENT}\n" in capsys.readouterr().err


def test_layers_with_windows_stay_dense_in_every_way():
    """What the adapter leaves alone is left alone where a selector stands in for it."""
    kinds = ["sliding_attention", "full_attention"]
    config = transformers.Qwen3Config(
        vocab_size=384, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=32,
        use_sliding_window=True, layer_types=kinds,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).eval()
    dense = dense_layers(model)
    assert dense == {0: "it attends to a sliding window"}
    ids = torch.randint(3, 259, (1, 100), generator=torch.Generator().manual_seed(0))
    asked = set()

    class Watched(Window):
        def choose(self, one, k):
            asked.add(one.layer)
            return super().choose(one, k)

    policy = decoding.Policy(0.1, 0, 1, 1, 128)
    decoding.losses(model, ids, [decoding.simulated(model, Watched(1), policy, dense)], 4)
    assert asked == {1}


def test_places():
    assert parse_places(["4096", "128:3,5"]) == [(4096, [64, 128]), (128, [3, 5])]
    assert parse_places(["256:8,8", "256", "64", "256:8"]) == [(256, [8, 4]), (64, [1, 2])]
    with pytest.raises(CaptureError):
        parse_places(["0"])


def test_the_harness_is_attached(model, encoders, monkeypatch):
    """A stand-in for the harness: its model is attached, its own settings reach it."""
    seen = {}

    class HFLM:
        def __init__(self, pretrained, **settings):
            self.model = pretrained
            seen.update(settings)

    name = "lm_eval.models.huggingface"
    for part in ("lm_eval", "lm_eval.models", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    sys.modules[name].HFLM = HFLM
    encoder = encoders["query projection"]
    selection = hata.Selection(bits=32, k=16, dense_layers=0)
    wrapped = harness.harness_model(model, encoder, selection=selection, batch_size=4)
    assert seen == {"batch_size": 4}
    assert "attached LlamaForCausalLM: 2 of 2 layers" in repr(wrapped.hata_handle)
    wrapped.hata_handle.detach()
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CaptureError, match="needs lm-evaluation-harness"):
        harness.harness_model(model, encoder)
