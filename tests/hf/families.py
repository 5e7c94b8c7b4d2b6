"""A tiny random model of nearly every causal language model of the installed transformers."""

import inspect
import typing

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers import CONFIG_MAPPING, PreTrainedConfig  # noqa: E402
from transformers.models.auto.modeling_auto import (  # noqa: E402
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

LAYERS = 4
LARGEST = 4_000_000
# What a size is called by the configurations. A name that a configuration lacks is not set.
_SIZES = [
    (128, "mamba_d_ssm"),
    (97, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size"),
    (512, "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length"),
    (512, "max_target_positions position_embedding_size"),
    (64, "hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim embedding_dim"),
    (64, "input_embedding_size output_embedding_size lru_width backbone_hidden_size"),
    (64, "max_source_positions rel_extent out_hidden_size ext_pw_out_channel nemo_conv_channels"),
    (64, "depthwise_separable_out_channel hidden_size_global"),
    (48, "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner dff dim_ff n_inner"),
    (48, "feed_forward_size ffn_hidden_size intermediate_size_mlp dense_intermediate_size"),
    (48, "prefix_dense_intermediate_size mlp_dim"),
    (32, "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size"),
    (32, "shared_experts_intermediate_size shared_intermediate_size router_hidden_size"),
    (32, "moe_shared_expert_intermediate_size q_lora_rank kv_lora_rank o_lora_rank index_head_dim"),
    (16, "head_dim d_head dim_head kv_channels attention_head_size swa_head_dim v_head_dim"),
    (16, "qk_rope_head_dim qk_nope_head_dim linear_head_dim linear_key_head_dim image_size"),
    (
        16,
        "linear_value_head_dim mamba_d_head mamba_head_dim mamba_headdim mamba_d_state state_size",
    ),
    (16, "ssm_state_size hidden_size_per_layer_input attention_chunk_size adapter_rank"),
    (16, "pronunciation_embed_dim shape_embed_dim indexer_head_dim num_mel_bins block_multiple_of"),
    (9, "sliding_window sliding_window_size attention_window_size window_size"),
    (8, "mamba_n_heads mamba_num_heads chunk_size mamba_chunk_size mamba_dt_rank time_step_rank"),
    (8, "index_topk index_block_size laurel_rank gated_norm_rank loop_gate_rank hc_lowrank"),
    # Indexers need heads: a key that no head likes scores nothing, and ties are broken by chance.
    (8, "rotary_dim num_position_embeddings index_n_heads indexer_n_heads"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers"),
    (LAYERS, "num_decoder_layers num_encoder_layers num_blocks"),
    (4, "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads"),
    (4, "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads"),
    (4, "swa_num_attention_heads linear_num_heads linear_num_value_heads num_experts"),
    (4, "n_routed_experts num_local_experts moe_num_experts"),
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts"),
    (2, "index_topk_blocks n_mamba_heads zero_expert_num max_window_layers"),
    (2, "type_vocab_size patch_size o_groups hc_mult hc_count depth"),
    (1, "n_group topk_group num_expert_group n_groups mamba_n_groups mamba_ngroups bos_index"),
    (1, "first_k_dense_replace n_shared_experts num_shared_experts moe_num_shared_experts"),
    (1, "n_input_layers n_output_layers"),
    (1, "num_dense_layers bos_token_id decoder_start_token_id moe_layer_start_index"),
    # Large weights, so that attention is sharp and a wrong key changes the answer.
    (0.3, "initializer_range init_std initializer_factor embed_init_std"),
    (0, "pad_token_id pad_index num_nextn_predict_layers num_mtp_layers"),
    (None, "eos_token_id eos_index forced_eos_token_id"),
    (True, "is_decoder"),
    # Untied, since a tied model with large weights likes to repeat the token that it was given.
    (False, "use_mamba_kernels tie_word_embeddings"),
]
_SIZE_OF = {name: size for size, text in _SIZES for name in text.split()}
# What a family needs besides. A nested configuration is looked up by its own type.
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_LATENT_SLIDING = {"swa_q_lora_rank": 32, "swa_kv_lora_rank": 32, "swa_qk_nope_head_dim": 16}
_FAMILIES = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 97},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {**_ROPE, "mrope_section": [3, 3, 2]}},
        "sliding_window": 9,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 4},
    },
    "dots3_note_text": {
        **_LATENT_SLIDING,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 32,
        "swa_v_head_dim": 16,
        "head_dim": 32,
    },
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_text": {"global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 9},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "modernbert-decoder": {"local_attention": 18},
    "qwen4_exp_text": {
        "indexer_kv_heads": 1,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [16, 32],
    },
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
_TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "decoder_start_token_id": 1,
}
_OUT = {
    "gemma4_assistant": "a draft model: it has no keys of its own",
    "gemma4_unified_assistant": "a draft model: it has no keys of its own",
}
REPRESENTATIVE = (
    *("llama", "phi3", "olmo2", "qwen3", "gemma2", "gpt_oss", "cohere2", "llama4_text"),
    *("gemma3n_text", "gemma4_text", "mixtral", "glm4_moe", "deepseek_v3", "deepseek_v32"),
    *("minimax", "qwen3_next", "jamba", "falcon_h1", "lfm2", "gpt2", "gpt_neox", "opt"),
    *("bloom", "afmoe", "bart"),
)


class CannotBuild(Exception):
    """Why no tiny model of a family can be had."""


def names():
    """Return the types of every causal language model that the installed transformers has."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _spread(kinds, full=("full_attention", "attention", "hybrid")):
    """Return a kind for each layer: every kind of a default list, and full attention twice."""
    kinds = list(dict.fromkeys(kinds))
    whole = [kind for kind in kinds if kind in full]
    others = [kind for kind in kinds if kind not in full]
    if not whole or not others:
        return [kinds[place % len(kinds)] for place in range(LAYERS)]
    return [others[0], whole[0], others[-1], whole[-1]]


def configure(config_class, **changes):
    """Return a tiny configuration of a class, with tiny configurations in it."""
    fields = set(inspect.signature(config_class.__init__).parameters)
    fields |= set(PreTrainedConfig().to_dict()) - {"dtype"}
    values = {name: size for name, size in _SIZE_OF.items() if name in fields}
    values["pad_token_id"], values["bos_token_id"], values["eos_token_id"] = 0, 1, None
    family = dict(_FAMILIES.get(config_class.model_type, {}))
    if "kv_lora_rank" in fields:
        values["num_key_value_heads"] = 4
    try:
        default = config_class()
    except Exception:
        default = None
    for name in config_class.sub_configs:
        inner = getattr(default, name, None)
        if inner is not None and name not in family:
            given = changes if name == "text_config" else {}
            values[name] = configure(type(inner), **given).to_dict()
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = getattr(default, name, None)
        if name in fields and isinstance(kinds, (list, tuple)) and len(set(kinds)) > 1:
            values[name] = _spread(kinds)
    slides = any("sliding" in kind for kind in values.get("layer_types", ()))
    field = getattr(config_class, "__dataclass_fields__", {}).get("sliding_window")
    if field and not slides and type(None) in typing.get_args(field.type):
        values["sliding_window"] = None
    if "text_config" not in values:
        family.update(changes)
    return config_class(**{**values, **family})


def build(model_type, **changes):
    """Return a tiny random model of a family, the same one each time.

    Args:
        model_type: One of `names()`.
        **changes: Values of its (text) configuration other than the tiny ones.

    Raises:
        CannotBuild: The model needs a package that is missing, or its configuration is unlike all
            others.
    """
    if model_type in _OUT:
        raise CannotBuild(_OUT[model_type])
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    try:
        model_class = getattr(transformers, name if isinstance(name, str) else name[0])
        config_class = CONFIG_MAPPING[model_type]
        if model_class.config_class in config_class.sub_configs.values():
            config_class = model_class.config_class
        config = configure(config_class, **changes)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(config).parameters())
        if size > LARGEST:
            raise CannotBuild(f"{size} parameters: a size of it has a name that is not known here")
        torch.manual_seed(11)
        model = model_class(configure(config_class, **changes)).float().eval()
    except CannotBuild:
        raise
    except Exception as error:
        raise CannotBuild(f"{type(error).__name__}: {error}") from error
    _fill(model)
    model.generation_config.update(**_TOKENS)
    return model


@torch.no_grad()
def _fill(model):
    """Make parameters random that a fresh model has as zeros or as whatever was in memory."""
    for parameter in model.parameters():
        if not parameter.isfinite().all() or not parameter.any():
            parameter.normal_(std=0.3)
