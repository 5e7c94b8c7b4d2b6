"""Families of models: read as they are, and refused by every tool in the words of `attach`."""

import runpy
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers

import hata
import hata.hf
from hata import cli
from hata.calibration import recorder
from hata.calibration.hashable import check_config, dense_layers
from hata.encoder import Encoder
from hata.errors import AttachError, CaptureError
from hata.evaluate import decoding
from hata.evaluate.selectors import Coded, Exact
from hata.hf import models
from hata.hf.reasons import NOT_CACHED
from hata.learn import capture
from hata.profile import Profile

pytestmark = pytest.mark.hf

EXAMPLE = Path(__file__).parents[2] / "examples" / "generate.py"
SIZES = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 4096, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
MIXED = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "Llama": {},
    "DiffLlama": {},
    "DeepseekV2": LATENT,
    "DeepseekV3": LATENT,
    "DeepseekV32": {**LATENT, "index_topk": 8, "index_head_dim": 32, "index_n_heads": 2},
    "DeepseekV4": {
        "q_lora_rank": 32, "num_key_value_heads": 1, "head_dim": 32, "sliding_window": 9,
        "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
    },
    "MiniMax": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "Mistral": {"sliding_window": 9},
    "Gemma2": {**MIXED, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
    "GptOss": {**MIXED, "num_local_experts": 2, "num_experts_per_tok": 1},
    "Gemma4": {
        **MIXED, "vocab_size_per_layer_input": 384, "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0, "global_head_dim": 32, "num_hidden_layers": 4,
        "layer_types": MIXED["layer_types"] * 2,
    },
    "Bloom": {"n_layer": 2, "n_head": 4},
    "Bert": {},
}  # fmt: skip
CLASSES = {"Gemma4": ("Gemma4TextConfig", "Gemma4ForCausalLM"),
           "Bert": ("BertConfig", "BertLMHeadModel")}  # fmt: skip
DENSE = ("DiffLlama", "DeepseekV2", "DeepseekV3", "DeepseekV32", "DeepseekV4", "Mistral")
OUTSIDE = ("Bloom", "Bert")


@pytest.fixture(scope="module")
def folder_of(tiny, tmp_path_factory):
    """Name of a family -> folder of a random model of it."""
    made = {}

    def make(name):
        if name not in made:
            config, model = CLASSES.get(name, (f"{name}Config", f"{name}ForCausalLM"))
            torch.manual_seed(0)
            config = getattr(transformers, config)(**SIZES | MODELS[name])
            made[name] = tmp_path_factory.mktemp(name)
            getattr(transformers, model)(config).save_pretrained(made[name])
            shutil.copy(tiny / "tokenizer_config.json", made[name])
        return made[name]

    return make


@pytest.fixture
def tool(text, tmp_path, monkeypatch, capsys):
    """Run a tool on a model: its name and options -> status, output and errors."""

    def run(name, model, *more):
        monkeypatch.chdir(tmp_path)
        words = [name, "--model", str(model), "--text", str(text)]
        if name == "tune":
            pytest.importorskip("optuna", reason="the tuner needs the [tune] extra")
            from tune.__main__ import main

            status = main([*words[1:], "--gpu", "cpu", "--quick", *more])
        elif name == "generate":
            example = hata_example()
            monkeypatch.setattr(sys, "argv", ["generate.py", *words[1:3], *more])
            status = example["main"]()
        else:
            status = cli.main([*words, "--device", "cpu", *more])
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        return status, told.out, told.err

    return run


LEARN = ("--out", "e.safetensors", "--sequences", "2", "--tokens", "256", "--queries", "32",
         "--steps", "2", "--bits", "32")  # fmt: skip
EVAL = ("--at", "128:32", "--sequences", "1", "--queries", "16", "--bits", "32", "--perplexity",
        "3", "--dense-layers", "0")  # fmt: skip
TUNE = ("--out", "p.yaml", "--storage", "s.db", "--trials", "1", "--budget", "1")
GENERATE = ("--prompt", "a = 1\nb = 2\nc = 3\nprint(a, b, c)\n", "--k", "24", "--bits", "32",
            "--max-new-tokens", "4")  # fmt: skip


def hata_example():
    """`examples/generate.py`, as it is run."""
    return runpy.run_path(str(EXAMPLE))


def ids_of(tokens):
    return torch.randint(3, 259, (1, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["Llama", "DeepseekV32", "DeepseekV4", "Gemma2", "GptOss"])
def test_what_is_read_is_what_the_model_itself_reads(folder_of, name):
    """Its own masks and its own function, longer than windows and what an indexer takes."""
    ids, outputs, seen = ids_of(60), [], []
    model = recorder.load_model(folder_of(name), "cpu")
    model.base_model.register_forward_hook(
        lambda module, args, output: outputs.append(output.last_hidden_state)
    )
    recorder.read(model, ids, lambda layer, *rest: seen.append(layer))
    own = transformers.AutoModelForCausalLM.from_pretrained(folder_of(name), dtype=torch.float32)
    assert model.config._attn_implementation == own.config._attn_implementation
    with torch.inference_mode():
        expected = own.eval().base_model(ids, use_cache=False).last_hidden_state
    assert torch.equal(outputs[0], expected)
    # DeepSeek V4 attends to more keys than tokens where it compresses.
    assert name == "DeepseekV4" or seen == [0, 1]


def test_an_attached_model_is_read_alike(folder_of):
    found = [], []
    model = recorder.load_model(folder_of("Llama"), "cpu")
    ids = ids_of(40)
    recorder.read(model, ids, lambda *shown: found[0].append(shown))
    with hata.hf.attach(model, selection=hata.Selection(bits=32, k=8, dense_layers=0)):
        before = model.generate(ids, max_new_tokens=4, do_sample=False)
        recorder.read(model, ids, lambda *shown: found[1].append(shown))
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), before)
    for one, other in zip(*found, strict=True):
        assert (one[0], one[3]) == (other[0], other[3])
        assert torch.equal(one[1], other[1])
        assert torch.equal(one[2], other[2])


def reason_of_attach(folder):
    """What `attach` says of a model that it hashes no layer of."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with pytest.raises(AttachError) as error:
        hata.hf.attach(model, strict=True)
    return str(error.value).partition(": ")[2]


@pytest.mark.parametrize("name", [*DENSE, *OUTSIDE])
@pytest.mark.parametrize(
    ("command", "options"),
    [("learn", LEARN), ("eval", EVAL), ("tune", TUNE), ("generate", GENERATE)],
)
def test_every_tool_refuses_what_attach_refuses(folder_of, tool, name, command, options):
    told = reason_of_attach(folder_of(name)).removeprefix("no layer will use hash attention: ")
    status, out, err = tool(command, folder_of(name), *options)
    assert (status, out) == (2, "")
    line = err.splitlines()[-1]
    assert "error: " in line
    assert line.endswith(told)
    assert len(told) > 20


@pytest.mark.parametrize("name", ["DiffLlama", "DeepseekV3"])
def test_what_only_reading_shows(folder_of, name, monkeypatch):
    """Models of which nothing is known beforehand."""
    model = recorder.load_model(folder_of(name), "cpu")
    monkeypatch.setattr(models, "DENSE", {})
    monkeypatch.setattr(models, "why_dense", lambda config: [""] * config.num_hidden_layers)
    check_config(model.config)
    with pytest.raises(CaptureError, match=f"no layer of {name}ForCausalLM can be hashed") as error:
        dense_layers(model)
    assert (NOT_CACHED if name == "DiffLlama" else "latent attention") in str(error.value)


def test_an_argument_that_is_not_known_is_named(folder_of, monkeypatch):
    model = recorder.load_model(folder_of("Llama"), "cpu")
    module = model.model.layers[1].self_attn
    own = module.forward
    monkeypatch.setattr(module, "forward", lambda *a, **kw: own(*a, **kw, indices=torch.ones(1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = dense_layers(model)
    assert told == {1: "an argument of its attention that is not known: indices"}


def test_layers_that_cannot_be_hashed_are_not_captured(folder_of, tmp_path):
    model = recorder.load_model(folder_of("MiniMax"), "cpu")
    dense = dense_layers(model)
    assert list(dense) == [1]
    ids = ids_of(60).numpy()
    capture.capture(model, ids, tmp_path, sequences=[0], layers=[0, 1], queries=8)
    assert capture.refused(tmp_path, 0) == dense
    with pytest.raises(CaptureError, match=f"--layers: got none .* hashed: {dense[1]}; name"):
        capture.capture(model, ids, tmp_path, sequences=[0], layers=[1], queries=8)


def test_a_model_whose_layers_have_several_sizes(folder_of, tool, tmp_path):
    """Gemma 4: what is hashed is sized as its layers of full attention are."""
    folder = folder_of("Gemma4")
    assert tool("learn", folder, *LEARN)[0] == 0
    encoder = Encoder.load(tmp_path / "e.safetensors")
    assert (encoder.shape.head_dim, encoder.dense_layers) == (32, (0, 2))
    status, out, _ = tool("eval", folder, *EVAL, "--encoder", "e.safetensors")
    assert status == 0
    assert "| e | 32 |" in out
    status, out, err = tool("generate", folder, "--encoder", "e.safetensors", *GENERATE)
    assert status == 0, err
    assert "1 of 4 layers planned to hash" in out


def test_the_tuner_leaves_layers_dense_that_cannot_be_hashed(folder_of, tool, tmp_path):
    status, out, err = tool("tune", folder_of("Gemma4"), *TUNE)
    assert status == 0
    assert "layer 0 stays dense: it attends to a sliding window" in out + err
    (chosen,) = Profile.load(tmp_path / "p.yaml").selections
    assert chosen.model.head_dim == 32
    assert chosen.layers[0] is None


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_selector_decodes_as_the_adapter_does(folder_of, implementation):
    model = recorder.load_model(folder_of("Llama"), "cpu")
    model.set_attn_implementation(implementation)
    ids = ids_of(60)
    encoder = Encoder.random(model.config, 32)
    policy = decoding.Policy(0.2, 0, 2, 3, 64)
    ways = [
        decoding.attached("attached", model, encoder, 32, policy),
        decoding.simulated(model, Coded("simulated", encoder, 32), policy),
    ]
    nats = decoding.losses(model, ids, [decoding.dense(), *ways], 4)
    assert nats["attached", 32] == pytest.approx(nats["simulated", 32], rel=1e-4)
    assert abs(nats["attached", 32] - nats["dense", 0]) > 1e-3
    assert len(decoding.answers(model, ids, ways, 3)) == 2


@pytest.mark.parametrize("name", ["Gemma2", "GptOss", "DeepseekV32", "Gemma4"])
def test_a_budget_of_all_keys_is_the_models_own_attention(folder_of, name):
    """Its windows, caps, sinks and selections stay where a mask is laid over them."""
    model = recorder.load_model(folder_of(name), "cpu")
    ids = ids_of(60)
    ways = [decoding.dense(), decoding.simulated(model, Exact(), decoding.Policy(1.0, 0, 0, 0, 64))]
    nats = decoding.losses(model, ids, ways, 4)
    assert nats["exact top-k", 0] == pytest.approx(nats["dense", 0], rel=1e-5)


def test_masks_keep_their_kind():
    chosen = torch.tensor([True, True, False])
    hidden = torch.tensor([True, False, True])
    low = torch.finfo(torch.float16).min
    both = decoding._masked(hidden, chosen, torch.float16, False)
    assert both.tolist() == [True, False, False]
    added = torch.tensor([1.0, low, 0.0], dtype=torch.float16)
    assert decoding._masked(added, chosen, torch.float32, True).tolist() == [1.0, low, low]
    assert decoding._masked(None, chosen, torch.float16, True) is chosen
    made = decoding._masked(None, chosen, torch.float16, False)
    assert (made.dtype, made.tolist()) == (torch.float16, [0.0, 0.0, low])
