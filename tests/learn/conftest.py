"""A tiny model that reads bytes, samples of a layer with a few keys that matter, and encoders."""

import itertools
import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hata.encoder import Encoder, Hidden, ModelShape, QueryHash  # noqa: E402
from hata.learn.samples import LayerSamples, Read  # noqa: E402

SIZES = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads gain nothing on models this small, and stall one another on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a random model of two layers."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    return folder


@pytest.fixture(scope="session")
def latent(tiny, tmp_path_factory):
    """Folder of a random model with multi-head latent attention."""
    sizes = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 64, "kv_lora_rank": 16,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
             "q_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
             "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1,
             "moe_intermediate_size": 32, "first_k_dense_replace": 2, "head_dim": 16,
             "max_position_embeddings": 4096}  # fmt: skip
    folder = tmp_path_factory.mktemp("latent")
    config = transformers.DeepseekV3Config(**sizes)
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(folder)
    shutil.copy(tiny / "tokenizer_config.json", folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file of text."""
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text("".join(f"value_{i} = {i * i}\nprint(value_{i})\n" for i in range(600)))
    return path


@pytest.fixture(scope="session")
def samples():
    """Two sequences of a layer: keys around centres, queries near a few of them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    heads, group, size, slots = 2, 2, 32, 512
    offset, centres = 2 * normal(heads, 1, size), normal(heads, 12, size)
    reads = []
    for _ in range(2):
        which = torch.randint(12, (heads, slots), generator=generator)
        keys = offset + torch.stack([centres[h, which[h]] for h in range(heads)])
        keys = keys + 0.5 * normal(heads, slots, size)
        positions = torch.arange(256, slots)
        asked = torch.randint(12, (heads, len(positions)), generator=generator)
        common = torch.stack([centres[h, asked[h]] for h in range(heads)])[:, None]
        q = 2 * common + 0.7 * normal(heads, group, len(positions), size)
        reads.append(Read(positions, q, keys))
    return LayerSamples(reads, size**-0.5)


@pytest.fixture(scope="session")
def encoders():
    """One encoder of every kind, for the sizes of the tiny model: name -> encoder."""
    rng = np.random.default_rng(0)
    shape = ModelShape("llama", 2, 4, 2, 16)

    def normal(*sizes):
        return rng.standard_normal(sizes, np.float32)

    def networks(heads, widths):
        return tuple(
            Hidden(normal(heads, a, b) / a**0.5, normal(heads, b))
            for a, b in itertools.pairwise(widths)
        )

    def both(make):
        return tuple(make() for _ in range(2))

    plain = both(lambda: normal(2, 16, 64))
    biases = both(lambda: normal(2, 64))
    deep, wide = (16, 24, 32), (16, 48)
    return {
        "query projection": Encoder(
            shape, 64, plain, biases,
            queries=both(lambda: QueryHash(normal(2, 16, 64), normal(2, 64))),
        ),
        "codes per query head": Encoder(
            shape, 64, plain, biases,
            queries=both(lambda: QueryHash(normal(4, 16, 64), normal(4, 64))),
        ),
        "several codes per query head": Encoder(
            shape, 64, plain, biases,
            queries=both(lambda: QueryHash(normal(12, 16, 64), normal(12, 64))),
        ),
        "networks": Encoder(
            shape, 64, both(lambda: normal(2, 32, 64)), biases,
            queries=both(lambda: QueryHash(normal(4, 48, 64), normal(4, 64), networks(4, wide))),
            hidden=both(lambda: networks(2, deep)),
        ),
        "keys per query head": Encoder(
            shape, 64, both(lambda: normal(4, 32, 64)), both(lambda: normal(4, 64)),
            queries=both(lambda: QueryHash(normal(4, 48, 64), None, networks(4, wide))),
            hidden=both(lambda: networks(4, deep)),
        ),
        "key norms": Encoder(
            shape, 64, plain, biases, True,
            queries=both(lambda: QueryHash(normal(12, 16, 64))),
        ),
    }  # fmt: skip
