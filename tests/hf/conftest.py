"""Tiny models of every family, their answers, and an attention that selects by brute force."""

import copy
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hata  # noqa: E402
import hata.hf  # noqa: E402
from hata.hf.layer_plan import DensePlan  # noqa: E402
from hata.hf.models import cache_among  # noqa: E402

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    # Large weights, so that attention is sharp and a wrong key changes the answer.
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "mistral-sliding": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 9}),
    "qwen3-mixed": (
        "Qwen3Config",
        "Qwen3ForCausalLM",
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "sliding_window": 9,
            "attn_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 9,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "sliding_window": 9,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {}),
}


def build(family, **changes):
    """A freshly made model of random weights; the same every time.

    Args:
        family: One of `FAMILIES`, or a configuration, a class and sizes like those.
        **changes: Sizes that differ.
    """
    config_name, model_name, extra = FAMILIES[family] if isinstance(family, str) else family
    sizes = {**SIZES, **extra, **changes}
    attention = sizes.pop("attn_implementation", None)
    if family == "gpt2":
        sizes = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    config = getattr(transformers, config_name)(**sizes)
    torch.manual_seed(11)
    if attention is not None:
        config._attn_implementation = attention
    model = getattr(transformers, model_name)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_()
    return model


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads gain nothing on models this small, and stall one another on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny():
    """`tiny("llama")`: a model of that family, made once and never left attached."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = build(family)
        return made[family]

    return get


@pytest.fixture
def fresh():
    """`fresh("llama", **changes)`: a model that this test may change."""
    return build


@pytest.fixture
def prompts():
    """`of(rows, tokens)` of random tokens, and `padded(rows)` with more padding in every row."""

    def of(rows, tokens):
        generator = torch.Generator().manual_seed(rows * 1000 + tokens)
        return torch.randint(3, 97, (rows, tokens), generator=generator)

    def padded(rows=3, tokens=23, pad=5, side="left"):
        ids = of(rows, tokens)
        mask = torch.ones_like(ids)
        for row in range(rows):
            hidden = slice(0, row * pad) if side == "left" else slice(tokens - row * pad, tokens)
            ids[row, hidden] = 0
            mask[row, hidden] = 0
        return {"input_ids": ids, "attention_mask": mask}

    return SimpleNamespace(of=of, padded=padded)


@pytest.fixture
def answer():
    """`answer(model, ids, **kwargs)` -> tokens and the logits of every new one."""

    def run(model, inputs, **kwargs):
        if not isinstance(inputs, dict):
            inputs = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
        settings = {"max_new_tokens": 10, "do_sample": False, **kwargs}
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = model.generate(
                **inputs, **settings, output_logits=True, return_dict_in_generate=True
            )
        return SimpleNamespace(
            tokens=out.sequences, logits=torch.stack(out.logits), cache=cache_among(out)
        )

    return run


@pytest.fixture
def always_hash(monkeypatch):
    """Run the ops however short the context is: nothing falls back to the model's own attention."""
    monkeypatch.setattr("hata.hf.layer_plan.covered", lambda selection: 0)


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of every `hata.hash_attend` call of a hashed layer."""
    seen = []
    original = hata.hash_attend

    def spy(*args, **kwargs):
        if kwargs["dense_below"] != DensePlan.dense_below:
            seen.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(hata, "hash_attend", spy)
    return seen


def brute_force(plans):
    """An attention function that selects as an attached model should, from nothing but q and k.

    Args:
        plans: Per layer `None` or `(projection [Hkv, D, r], Selection)`.
    """

    def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        groups = query.shape[1] // key.shape[1]
        k = key.double().repeat_interleave(groups, 1)
        v = value.double().repeat_interleave(groups, 1)
        logits = query.double() @ k.mT * scaling
        if kwargs.get("softcap") is not None:
            logits = kwargs["softcap"] * torch.tanh(logits / kwargs["softcap"])
        tokens, slots = query.shape[2], key.shape[2]
        visible = attention_mask
        if visible is None:
            # transformers leaves the mask out where query t sees the first t + 1 keys, or all.
            visible = torch.ones(tokens, slots, dtype=torch.bool)
            visible = visible if tokens == 1 else visible.tril()
        visible = visible.expand(query.shape[0], 1, tokens, slots)
        plan = plans[module.layer_idx]
        if plan is not None and tokens == 1 and kwargs.get("sliding_window") is None:
            visible = chosen(query, key, visible, *plan).repeat_interleave(groups, 1)
        logits = logits.masked_fill(~visible, -torch.inf)
        sinks = kwargs.get("s_aux")
        if sinks is not None:
            sinks = sinks.double().reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
            weights = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
        else:
            weights = logits.softmax(-1)
        weights = weights.nan_to_num(0.0)
        return (weights @ v).to(query.dtype).transpose(1, 2).contiguous(), None

    def chosen(query, key, visible, projection, selection):
        projection = torch.from_numpy(np.array(projection)).double()
        kv_heads = key.shape[1]
        q_bits = (query.double().unflatten(1, (kv_heads, -1)) @ projection[None, :, None]) > 0
        k_bits = (key.double() @ projection[None]) > 0
        # [B, Hkv, S]: differing bits, summed over the queries of a group.
        q_bits = q_bits[..., 0, :]
        distance = (q_bits[:, :, :, None] != k_bits[:, :, None]).sum((2, 4))
        kept = torch.zeros_like(visible).repeat(1, kv_heads, 1, 1)
        for row in range(query.shape[0]):
            places = visible[row, 0, 0].nonzero()[:, 0]
            count = len(places)
            budget = selection.k
            if selection.ratio is not None:
                least = max(1, selection.k_min, selection.sink + selection.recent)
                budget = min(budget, max(least, count * round(selection.ratio * 2**32) >> 32))
            if count <= (selection.min_length or 0):
                budget = count
            for head in range(kv_heads):
                order = {int(p): int(distance[row, head, p]) for p in places}
                for p in [*places[: selection.sink], *places[count - selection.recent :]]:
                    order[int(p)] = -1
                best = sorted(order, key=lambda p: (order[p], p))[:budget]
                kept[row, head, 0, best] = True
        return kept

    return attend


@pytest.fixture
def by_brute_force(answer):
    """`by_brute_force(model, handle, inputs, **kwargs)`: what an attached model should answer."""
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    def run(model, handle, inputs, **kwargs):
        plans = [
            None if chosen is None else (handle.encoder.projection(i, chosen.bits), chosen)
            for i, chosen in enumerate(handle.selections)
        ]
        AttentionInterface.register("brute_force", brute_force(plans))
        AttentionMaskInterface.register("brute_force", sdpa_mask)
        twin = copy.deepcopy(model)
        twin.set_attn_implementation("brute_force")
        return answer(twin, inputs, **kwargs)

    return run
