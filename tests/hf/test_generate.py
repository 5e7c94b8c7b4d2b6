"""Every way to generate: with a budget that covers the context, the model's own answer."""

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hata  # noqa: E402
import hata.hf  # noqa: E402
from hata.hf.models import cache_among, cache_argument  # noqa: E402

# What this release calls the cache.
CACHE = cache_argument(transformers.LlamaForCausalLM)

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
ALL_KEYS = hata.Selection(bits=64, k=200, dense_layers=1)

# How to call generate, and whether the prompts have left padding.
MODES = {
    "greedy": ({}, False),
    "sampling": ({"do_sample": True, "temperature": 0.8, "top_k": 20}, False),
    "beams": ({"num_beams": 3}, False),
    "padded": ({}, True),
    "padded-beams": ({"num_beams": 2}, True),
    "chunked-prefill": ({"prefill_chunk_size": 7}, False),
    "padded-chunked": ({"prefill_chunk_size": 7}, True),
    "prompt-lookup": ({"prompt_lookup_num_tokens": 3}, False),
    "static": ({"cache_implementation": "static"}, False),
    "static-padded": ({"cache_implementation": "static"}, True),
    "static-beams": ({"cache_implementation": "static", "num_beams": 2}, False),
    "static-chunked": ({"cache_implementation": "static", "prefill_chunk_size": 7}, False),
    "no-cache": ({"use_cache": False}, False),
}


def own_and_attached(model, mode, prompts, answer):
    kwargs, padded = MODES[mode]
    inputs = prompts.padded() if padded else prompts.of(1, 23)
    own = answer(model, inputs, **kwargs)
    with hata.hf.attach(model, selection=ALL_KEYS):
        attached = answer(model, inputs, **kwargs)
    return own, attached


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_budget_of_all_keys_gives_own_tokens(
    family, mode, tiny, prompts, answer, always_hash, calls
):
    own, attached = own_and_attached(tiny(family), mode, prompts, answer)
    assert torch.equal(own.tokens, attached.tokens)
    torch.testing.assert_close(own.logits, attached.logits, rtol=1e-4, atol=1e-4)
    # Prompt look-up verifies several tokens at once, and without a cache there are no codes.
    assert bool(calls) == (mode != "no-cache")


@pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.startswith("static")])
def test_fault_69_short_context_dynamic_cache_is_bit_equal(mode, tiny, prompts, answer, calls):
    own, attached = own_and_attached(tiny("llama"), mode, prompts, answer)
    assert torch.equal(own.tokens, attached.tokens)
    assert torch.equal(own.logits, attached.logits)
    assert not calls


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.startswith("static")])
def test_fault_69_short_context_static_cache_has_the_same_tokens(
    mode, tiny, prompts, answer, calls
):
    own, attached = own_and_attached(tiny("llama"), mode, prompts, answer)
    assert torch.equal(own.tokens, attached.tokens)
    assert {call["dense_below"] for call in calls} == {200}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_fault_69_below_the_crossover_nothing_is_left_out(cache, tiny, prompts, answer):
    model, ids = tiny("llama"), prompts.of(1, 23)
    kwargs = {"cache_implementation": "static"} if cache == "static" else {}
    own = answer(model, ids, **kwargs)
    crossover = hata.Selection(bits=64, k=4, min_length=100, dense_layers=1)
    with hata.hf.attach(model, selection=crossover):
        attached = answer(model, ids, **kwargs)
    assert torch.equal(own.tokens, attached.tokens)
    if cache == "dynamic":
        assert torch.equal(own.logits, attached.logits)


def two_turns(model, cache, ids, more):
    first = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{CACHE: cache},
        max_new_tokens=6,
        do_sample=False,
    )
    second = torch.cat([first, more], 1)
    return model.generate(
        second,
        attention_mask=torch.ones_like(second),
        **{CACHE: cache},
        max_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cache_reuse_over_turns(kind, tiny, prompts, always_hash, calls):
    from transformers import DynamicCache, StaticCache

    model = tiny("llama")

    def cache():
        if kind == "dynamic":
            return DynamicCache(config=model.config)
        return StaticCache(config=model.config, max_cache_len=80)

    ids, more = prompts.of(1, 15), prompts.of(1, 5)
    own = two_turns(model, cache(), ids, more)
    with hata.hf.attach(model, selection=ALL_KEYS):
        attached = two_turns(model, cache(), ids, more)
    assert torch.equal(own.sequences, attached.sequences)
    torch.testing.assert_close(
        torch.stack(own.logits), torch.stack(attached.logits), rtol=1e-4, atol=1e-4
    )
    assert calls


def test_crop_then_continue(tiny, prompts, by_brute_force):
    """After a crop the codes are those of the keys that stayed: as if never gone further."""
    from transformers import DynamicCache

    model = tiny("llama")
    few = hata.Selection(bits=64, k=6, dense_layers=1)
    ids, other = prompts.of(1, 30), prompts.of(1, 31)[:, :4]

    def run(detour):
        cache = DynamicCache(config=model.config)
        logits = []
        with torch.no_grad():
            model(ids, **{CACHE: cache})
            if detour:
                for token in prompts.of(1, 9)[0]:
                    model(token.view(1, 1), **{CACHE: cache})
                cache.crop(-9)
            for token in other[0]:
                logits.append(model(token.view(1, 1), **{CACHE: cache}).logits)
        return torch.cat(logits)

    with hata.hf.attach(model, selection=few):
        assert torch.equal(run(detour=False), run(detour=True))


def test_a_cache_without_a_config_is_taken_over(tiny, prompts, always_hash, calls):
    from transformers import DynamicCache

    model, ids = tiny("llama"), prompts.of(1, 12)
    cache = DynamicCache()
    with hata.hf.attach(model, selection=ALL_KEYS), torch.no_grad():
        model(ids[:, :-1], **{CACHE: cache})
        model(ids[:, -1:], **{CACHE: cache})
    assert len(calls) == 2
    assert cache.get_seq_length() == 12


def test_a_copied_cache_is_independent(tiny, prompts):
    from transformers import DynamicCache

    model, ids = tiny("llama"), prompts.of(1, 30)
    tails = [prompts.of(1, 5), prompts.of(1, 6)[:, :5]]
    few = hata.Selection(bits=64, k=6, dense_layers=1)

    def go_on(cache, tail):
        return torch.cat([model(t.view(1, 1), **{CACHE: cache}).logits for t in tail[0]])

    with hata.hf.attach(model, selection=few), torch.no_grad():
        prefix = DynamicCache(config=model.config)
        model(ids, **{CACHE: prefix})
        alone = [go_on(copy.deepcopy(prefix), tail) for tail in tails]
        shallow = copy.copy(prefix)
        shallow.layers = [copy.copy(layer) for layer in prefix.layers]
        # In turns, so that one would tread on the other's keys.
        forks = [prefix, shallow]
        together = [[], []]
        for step in range(5):
            for i, fork in enumerate(forks):
                token = tails[i][:, step : step + 1]
                together[i].append(model(token, **{CACHE: fork}).logits)
    for i in range(2):
        assert torch.equal(alone[i], torch.cat(together[i]))


def test_inputs_embeds_and_positional_arguments(tiny, prompts, always_hash, calls):
    model, ids = tiny("llama"), prompts.of(1, 12)
    with torch.no_grad():
        own = model.model(ids).last_hidden_state[:, -1]
        with hata.hf.attach(model, selection=ALL_KEYS):
            cache = cache_among(model.model(ids[:, :-1], use_cache=True))
            embeds = model.get_input_embeddings()(ids[:, -1:])
            by_embeds = model.model(
                inputs_embeds=embeds, **{CACHE: copy.deepcopy(cache)}
            ).last_hidden_state[:, -1]
            positional = model.model(ids[:, -1:], None, None, cache).last_hidden_state[:, -1]
    assert len(calls) == 4
    torch.testing.assert_close(own, by_embeds, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own, positional, rtol=1e-4, atol=1e-4)
