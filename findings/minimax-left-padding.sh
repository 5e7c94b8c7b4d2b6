#!/usr/bin/env bash
# transformers 5.24.0 (also 5.23.0 and 5.17.0), MiniMaxForCausalLM, two prompts of which one has left
# padding: from the second token on, attention is given a mask of one key for a cache of all keys. The
# cache tells its length by its first layer, which has linear attention and keeps no keys, so the mask
# is made for a length of 0 and one new token, and only its first column, which is padding, is used.
# It is broadcast over all keys: the padded row sees none of them, and its answer is another than when
# it is generated alone. The row without padding is right.
#
# Seen: mask (2, 1, 1, 1) with [True, False] for 41 keys; the padded row differs, the other does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$work/env/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.24.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'PY'
import torch
import transformers
from transformers import MiniMaxConfig, MiniMaxForCausalLM

torch.manual_seed(11)
model = MiniMaxForCausalLM(
    MiniMaxConfig(
        vocab_size=97, hidden_size=64, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1,
        initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        layer_types=["linear_attention", "full_attention"] * 2,
    )
).eval()
masks = []
model.model.layers[1].self_attn.register_forward_pre_hook(
    lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
)


def logits(ids, mask):
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )
    return torch.stack(out.logits, 1)


ids = torch.randint(3, 97, (2, 40))
mask = torch.ones_like(ids)
ids[1, :11] = mask[1, :11] = 0
together = logits(ids, mask)
step = masks[1]
whole, short = logits(ids[:1], mask[:1])[0], logits(ids[1:, 11:], mask[1:, 11:])[0]
same = [torch.allclose(a, b, atol=1e-3) for a, b in ((together[0], whole), (together[1], short))]
print("transformers", transformers.__version__, "torch", torch.__version__)
print("mask of the second token:", tuple(step.shape), step[:, 0, 0, 0].tolist(), "for 41 keys")
print("row without padding as alone:", same[0], "- padded row as alone:", same[1])
assert tuple(step.shape) == (2, 1, 1, 1) and step[:, 0, 0, 0].tolist() == [True, False]
assert same == [True, False]
PY
echo "as described"
