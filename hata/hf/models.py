"""What is known of a model before it runs: where its decoder is, and which layers can be hashed."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import AttentionInterface

from hata.errors import AttachError
from hata.hf.intercept import calls_interface

_SUPPORTED = (
    "expected a decoder-only model of transformers whose attention goes through "
    "AttentionInterface, such as Llama, Qwen2, Qwen3 or Mistral"
)
NO_ATTENTION = "it has no attention that goes through the attention interface"
LATENT = "latent attention: its cache holds what keys and values are made of"


def inside(model: Any) -> PreTrainedModel:
    """The model of transformers that a module is, or wraps.

    Raises:
        AttachError: There is none, or more than one.
    """
    if isinstance(model, PreTrainedModel):
        return model
    found: dict[str, PreTrainedModel] = {}
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            within = any(name.startswith(f"{outer}.") for outer in found)
            if isinstance(module, PreTrainedModel) and not within:
                found[name] = module
    kind = type(model).__name__
    if len(found) > 1:
        names = ", ".join(f".{name} ({type(one).__name__})" for name, one in found.items())
        raise AttachError(f"model: got {kind}, which holds several models; pass one of {names}")
    if not found:
        raise AttachError(f"model: got {kind}, {_SUPPORTED}")
    return next(iter(found.values()))


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder of a model.

    Raises:
        AttachError: There is none that can be attached to, or it is attached already.
    """
    kind = type(model).__name__
    if not hasattr(AttentionInterface, "get_interface"):
        raise AttachError(
            "transformers: its AttentionInterface has no get_interface, which is where attention "
            "is taken over; install a tested release, 5.17 to 5.24"
        )
    if model.config.is_encoder_decoder:
        raise AttachError(f"model: got {kind}, an encoder-decoder model, {_SUPPORTED}")
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):
        raise AttachError(
            f"model: got {kind}, whose get_decoder() is a {type(decoder).__name__} and no model, "
            f"{_SUPPORTED}"
        )
    if "_hata_handle" in vars(decoder):
        raise AttachError(
            f"model: this {kind} is already attached; call detach() on the handle that attach "
            "returned, or hata.hf.detach(model), first"
        )
    if getattr(model, "_tp_size", None) not in (None, 1):
        raise AttachError(
            f"model: this {kind} was loaded with tensor parallelism, which shares KV heads out and "
            "is not supported yet; load it without tp_plan"
        )
    return decoder


def attention_modules(decoder: PreTrainedModel, name: str = "") -> dict[int, list[nn.Module]]:
    """The self-attention modules of each layer that goes through the attention interface.

    `name` is what errors call the model; its class unless given.

    Raises:
        AttachError: There is none, or they are not causal.
    """
    found: dict[int, list[nn.Module]] = defaultdict(list)
    for module in decoder.modules():
        index = getattr(module, "layer_idx", None)
        if type(index) is int and calls_interface(module) and "Cross" not in type(module).__name__:
            found[index].append(module)
    kind = name or type(decoder).__name__
    if not found:
        raise AttachError(
            f"model: got {kind}, in which no module calls the attention interface, {_SUPPORTED}"
        )
    if not any(getattr(one, "is_causal", True) for modules in found.values() for one in modules):
        raise AttachError(f"model: got {kind}, whose attention is not causal, {_SUPPORTED}")
    return found


def why_dense(config: Any) -> list[str]:
    """Why each layer can only attend densely; `""` where nothing speaks against hashing."""
    text = config.get_text_config()
    layers: list[Any] = list(DynamicCache(config=text).layers)
    # Layers that share the cache of others have none of their own in some releases.
    layers += [None] * (text.num_hidden_layers - len(layers))
    of_all = DENSE.get(text.model_type) or (LATENT if getattr(text, "kv_lora_rank", None) else "")
    return [_why_not_cached(layer) or of_all for layer in layers[: text.num_hidden_layers]]


def _why_not_cached(layer: Any) -> str:
    """Why a layer whose cache layer is of this kind cannot be hashed, if so."""
    if type(layer) is DynamicLayer:
        return ""
    kind = type(layer).__name__
    if layer is None or kind == "DummyLayer":
        return "it has no cache of its own"
    if "Linear" in kind:
        return "linear attention or a state space, by itself or beside its attention"
    if getattr(layer, "is_sliding", False):
        return "it attends to a sliding window"
    if "Indexed" in kind:
        return "it selects keys by an indexer of its own"
    return f"its cache is a {kind}, not one of keys and values alone"


def is_tested(config: Any) -> bool:
    """Whether a model is of a family that is tested, see docs/models.md."""
    model_type = config.get_text_config().model_type
    return model_type in TESTED or model_type in DENSE


# Families none of whose layers can be hashed, for reasons that their configuration does not show.
DENSE = {
    "diffllama": "it attends to parts of its values, twice",
    "doge": "its masks add learned numbers to the logits, other ones for each head",
    "hrm_text": "each of its attention modules writes to several cache layers, one per cycle",
    "jetmoe": "it attends to repetitions of its keys and values",
}
# Families that hash with every tested release that has them, as `make test-models` has seen.
_HASHED = """
afmoe apertus apertus1p5_text arcee aria_text bamba bart beam bert bert-generation biogpt
bitnet blenderbot blenderbot-small camembert cohere cohere2 cohere2_moe cohere_compass_text
ctrl cwm data2vec-text dbrx dory dots1 electra emu3 ernie ernie4_5 ernie4_5_moe exaone
exaone4 exaone_moe flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4
gemma4_text gemma4_unified gemma4_unified_text glm glm4 glm4_moe got_ocr2 gpt-sw3 gpt2
gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoehybrid
granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3
iquestcoder jais2 jamba kolibri1 laguna lara_mini lfm2 lfm2_moe lfm3 llama llama4
llama4_text marian mbart mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text
ministral ministral3 mistral mixtral mllama moss_transcribe_diarize nanochat nemotron
nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe opt pegasus persimmon phi phi3 phi4_multimodal
phimoe plbart qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text
qwen3_moe qwen3_next roberta roberta-prelayernorm roc_bert sarvam_moe seed_oss smollm3
solar_open stablelm starcoder2 vaultgemma whisper xlm-roberta xlm-roberta-xl xmod
"""
TESTED = frozenset(_HASHED.split())


def cache_argument(model: nn.Module) -> str:
    """What a model calls its cache: `past_key_values` up to transformers 5.23, `cache` since."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def cache_among(values: Mapping[str, Any]) -> Cache | None:
    """The cache among the arguments or in the output of a forward pass, whatever it is called."""
    # A loop, because torch.compile follows it.
    for value in values.values():
        if isinstance(value, Cache):
            return value
    return None
