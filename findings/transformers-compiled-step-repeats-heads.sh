#!/usr/bin/env bash
# transformers 5.24.0, a decode step of one token with grouped heads, SDPA and a static cache: run as it
# is, the step packs the queries of a group and hands SDPA the keys as the cache has them; compiled, which
# is what `generate` does with a static cache on a GPU, the very same step first repeats every key and
# value for each query head. So compiling makes attention move as many times more bytes as a group has
# heads (4 for Llama-3.1-8B), although both steps are given the same mask.
#
# Seen, 4 query heads on 2 KV heads: eager, SDPA gets keys [1, 2, 32, 16]; in the graph that torch.compile
# makes of the step, keys [1, 4, 32, 16].
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$work/env/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.24.0
cat >"$work/program.py" <<'PY'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

print("transformers", transformers.__version__)
sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
             num_attention_heads=4, num_key_value_heads=2, head_dim=16)
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
seen = {"eager": [], "compiled": []}
sdpa = torch.nn.functional.scaled_dot_product_attention


def recorded(query, key, *args, **kwargs):
    seen["eager"].append(list(key.shape))
    return sdpa(query, key, *args, **kwargs)


def backend(graph, inputs):
    for node in graph.graph.nodes:
        if node.target is sdpa:
            seen["compiled"].append(list(node.args[1].meta["example_value"].shape))
    return graph.forward


def step(run):
    torch._dynamo.reset()
    cache = StaticCache(config=model.config, max_cache_len=32)
    model(torch.ones(1, 8, dtype=torch.long), cache=cache)
    mask = torch.zeros(1, 1, 1, 32, dtype=torch.bool)
    mask[..., :9] = True
    position = torch.tensor([[8]])
    run(torch.ones(1, 1, dtype=torch.long), cache=cache, attention_mask=mask, position_ids=position)


with torch.no_grad():
    torch.nn.functional.scaled_dot_product_attention = recorded
    step(model)
    torch.nn.functional.scaled_dot_product_attention = sdpa
    step(torch.compile(model, backend=backend, dynamic=False))
for way, shapes in seen.items():
    print(f"{way}: SDPA gets keys {shapes[-1]}")
assert seen["eager"][-1] == [1, 2, 32, 16]
assert seen["compiled"][-1] == [1, 4, 32, 16]
PY
"$work/env/bin/python" "$work/program.py"
