"""A real model (`HATA_TEST_MODEL`): needles are found, and few keys are enough."""

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hata  # noqa: E402
import hata.hf  # noqa: E402
from hata.evaluate import tasks  # noqa: E402
from hata.hf.models import cache_argument  # noqa: E402

# What this release calls the cache.
CACHE = cache_argument(transformers.LlamaForCausalLM)

LENGTH = 768


@pytest.fixture(scope="module")
def model(model_path):
    return transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(model_path):
    """Needle prompts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path)

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    text = tasks.source_text()
    made = list(tasks.needles(encode, text, LENGTH, 3, pairs=4, seed=3))
    assert all(len(prompt.tokens) == LENGTH for prompt in made)
    return made, tokenizer


def test_needles_at_a_sixteenth_of_the_context(model, prompts):
    """Hash attention finds what dense attention finds, or misses one."""
    made, tokenizer = prompts
    selection = hata.Selection(bits=256, k=LENGTH, ratio=1 / 16)
    right = {"dense": 0, "hash": 0}
    for prompt in made:
        ids = torch.tensor([prompt.tokens])
        prefix = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :-1], **{CACHE: prefix}, logits_to_keep=1)
        for way in right:
            handle = hata.hf.attach(model, selection=selection) if way == "hash" else None
            cache = copy.deepcopy(prefix)
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **{CACHE: cache},
                max_new_tokens=6,
                do_sample=False,
            )
            if handle is not None:
                handle.detach()
                assert all(layer.coded == LENGTH + 5 for layer in cache.layers[2:])
            right[way] += tokenizer.decode(out[0, LENGTH:]).startswith(prompt.value)
    assert right["dense"] >= 2
    assert right["hash"] >= right["dense"] - 1


def test_budget_of_all_keys_gives_own_tokens(model, prompts, always_hash):
    ids = torch.tensor([prompts[0][0].tokens[:256]])

    def run():
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )

    own = run()
    with hata.hf.attach(model, selection=hata.Selection(bits=128, k=512)):
        assert torch.equal(own, run())
