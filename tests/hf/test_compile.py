"""A compiled decode step: one graph, no host reads, the same tokens."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers import CompileConfig, StaticCache  # noqa: E402

import hata  # noqa: E402
import hata.hf  # noqa: E402
from hata.hf.models import cache_argument  # noqa: E402

# What this release calls the cache.
CACHE = cache_argument(transformers.LlamaForCausalLM)

FEW = hata.Selection(bits=64, k=5, dense_layers=1)
# A dense layer, one whose budget takes all keys, and one that leaves most out. Each is there once,
# for tracing costs seconds a layer.
ONE_OF_EACH = [None, hata.Selection(bits=64, k=200), hata.Selection(bits=64, k=5)]


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("padded", [False, True], ids=["one", "padded"])
def test_static_cache_in_one_full_graph(padded, tiny, prompts):
    model = tiny("llama")
    inputs = prompts.padded() if padded else {"input_ids": prompts.of(2, 23)}
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    steps = prompts.of(mask.shape[0], 4).split(1, 1)

    def run(decode):
        cache = StaticCache(config=model.config, max_cache_len=40)
        logits = []
        with torch.no_grad():
            out = model(inputs["input_ids"], attention_mask=mask, **{CACHE: cache})
            seen = mask
            for token in steps:
                seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
                made = model.prepare_inputs_for_generation(
                    token, **{CACHE: cache}, attention_mask=seen, use_cache=True
                )
                out = decode(**made)
                logits.append(out.logits)
        return torch.cat(logits, 1)

    with hata.hf.attach(model, selection=ONE_OF_EACH):
        eager = run(model)
        compiled = run(torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("chunk", [None, 8], ids=["prefill", "chunked"])
def test_generate_compiles_the_decode_step(chunk, fresh, prompts, answer):
    model = fresh("llama", num_hidden_layers=2)
    compiled = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiled._compile_all_devices = True
    kwargs = {"cache_implementation": "static", "prefill_chunk_size": chunk}
    inputs = prompts.padded(tokens=24)
    with hata.hf.attach(model, selection=FEW):
        eager = answer(model, inputs, **kwargs)
        got = answer(model, inputs, **kwargs, compile_config=compiled)
    assert torch.equal(eager.tokens, got.tokens)
    torch.testing.assert_close(eager.logits, got.logits, rtol=1e-3, atol=1e-3)
