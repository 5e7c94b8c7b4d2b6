"""Decoding with any selector: as dense attention, through `hata.hf.attach`, or simulated.

A *way* is a name and a context manager that changes how a model decodes while it is open. Prefill
is dense in all of them. The budget of a step is a share of the keys that it sees, for all alike.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from transformers import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hata.hf
from hata.encoder import Encoder
from hata.errors import CaptureError
from hata.evaluate.selectors import Asked, Selector
from hata.hf.intercept import Function, Interception
from hata.hf.models import attention_modules, cache_among, cache_argument
from hata.selection import Selection


class Policy(NamedTuple):
    """What a step may attend to, for every way that chooses.

    Attributes:
        share: Budget, as a share of the visible keys.
        dense_layers: First layers that attend to all keys.
        sink: First keys always taken, within the budget.
        recent: Last keys always taken, within the budget.
        longest: Keys that a step may see at most.
    """

    share: float
    dense_layers: int
    sink: int
    recent: int
    longest: int

    def budget(self, visible: int) -> int:
        """Keys that a step may attend to, as `hata.hamming_topk` counts them."""
        k = (visible * round(self.share * 2**32)) >> 32
        return max(1, self.sink + self.recent, k)


class Way(NamedTuple):
    """A way to decode.

    Attributes:
        name: For tables.
        bits: Bits of its codes; 0 where it has none.
        open: Makes the context in which the model decodes this way.
    """

    name: str
    bits: int
    open: Callable[[], AbstractContextManager[Any]]


def dense() -> Way:
    """The model's own attention."""
    return Way("dense", 0, nullcontext)


def attached(name: str, model: Any, encoder: Encoder, bits: int, policy: Policy) -> Way:
    """Hash attention, through the adapter and the kernels that users get."""
    # The share decides; k only says how much room is set aside.
    k = max(math.ceil(policy.share * policy.longest), policy.sink + policy.recent)
    selection = Selection(
        bits=bits,
        k=k,
        ratio=policy.share,
        sink=policy.sink,
        recent=policy.recent,
        dense_layers=policy.dense_layers,
    )

    def opened() -> AbstractContextManager[Any]:
        with warnings.catch_warnings():
            # Whatever there is to say of the encoder is in the tables. `dense_layers` has checked
            # the model.
            warnings.simplefilter("ignore")
            return hata.hf.attach(model, encoder, selection=selection, check=False)

    return Way(name, bits, opened)


def simulated(model: Any, selector: Selector, policy: Policy, dense: Collection[int] = ()) -> Way:
    """Decode steps whose keys a selector chooses, by a mask for the model's own attention.

    Layers that the adapter leaves `dense` stay so here.
    """

    def attend(
        own: Function, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        query, key, value, mask, *rest = args
        if query.shape[2] == 1:
            chosen = _chosen(selector, module.layer_idx, query, key, policy)
            mask = _masked(mask, chosen, query.dtype, own is sdpa_attention_forward)
        return own(module, query, key, value, mask, *rest, **kwargs)

    @contextmanager
    def opened() -> Iterator[None]:
        found = attention_modules(model.get_decoder())
        taken = Interception(
            {
                module: attend
                for layer, modules in found.items()
                if layer >= policy.dense_layers and layer not in dense
                for module in modules
            }
        )
        try:
            yield
        finally:
            taken.close()

    return Way(selector.name, selector.bits, opened)


def _masked(
    mask: torch.Tensor | None, chosen: torch.Tensor, dtype: torch.dtype, boolean: bool
) -> torch.Tensor:
    """A mask that also hides what was not chosen, of its kind; without one, `boolean` or to add."""
    if mask is None:
        if boolean:
            return chosen
        mask = torch.zeros((), dtype=dtype, device=chosen.device)
    if mask.dtype == torch.bool:
        return mask & chosen
    return torch.where(chosen, mask, torch.finfo(mask.dtype).min)


def _chosen(
    selector: Selector, layer: int, query: torch.Tensor, key: torch.Tensor, policy: Policy
) -> torch.Tensor:
    """The mask `[B, H, 1, S]` of one decode step."""
    rows, kv_heads, slots, size = key.shape
    group = query.shape[1] // kv_heads
    q = query.reshape(rows * kv_heads, group, 1, size).float()
    given = torch.zeros((1, slots), dtype=torch.bool, device=key.device)
    k = min(policy.budget(slots), slots)
    if selector.guards and k < slots:
        given[:, : policy.sink] = True
        given[:, slots - policy.recent :] = True
        k -= policy.sink + policy.recent
    mask = given.repeat(rows * kv_heads, 1, 1)
    if k:
        asked = Asked(layer, q, key.flatten(0, 1).float(), given)
        mask.scatter_(2, selector.choose(asked, k), True)
    return mask.view(rows, kv_heads, 1, slots).repeat_interleave(group, dim=1)


def prefilled(model: Any, ids: torch.Tensor) -> Cache:
    """A cache of all tokens but the last."""
    with torch.inference_mode():
        cache = cache_among(model(ids[:, :-1], use_cache=True, logits_to_keep=1))
    if cache is None:
        raise CaptureError(f"--model: {type(model).__name__} gives no cache to go on from")
    return cache


def answers(
    model: Any, ids: torch.Tensor, ways: Sequence[Way], tokens: int
) -> dict[tuple[str, int], list[list[int]]]:
    """Greedy answers of so many tokens to prompts `[B, T]`, for every way, from one prefill.

    Returns:
        `(name, bits)` -> an answer's tokens per prompt.
    """
    cache = prefilled(model, ids)
    found = {}
    for way in ways:
        with way.open():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                **{cache_argument(model): copy.deepcopy(cache)},
            )
        found[way.name, way.bits] = out[:, ids.shape[1] :].tolist()
    return found


def losses(
    model: Any, ids: torch.Tensor, ways: Sequence[Way], last: int
) -> dict[tuple[str, int], float]:
    """Nats per token of the last tokens of ids `[B, T]`, fed one by one, for every way."""
    first = ids.shape[1] - last
    cache = prefilled(model, ids[:, :first])
    found = {}
    for way in ways:
        running = {cache_argument(model): copy.deepcopy(cache)}
        total = torch.zeros((), dtype=torch.float64, device=ids.device)
        with way.open(), torch.inference_mode():
            for place in range(first - 1, ids.shape[1] - 1):
                step = ids[:, place : place + 1]
                logits = model(step, use_cache=True, **running).logits[:, -1]
                wanted = ids[:, place + 1 : place + 2]
                total -= logits.double().log_softmax(-1).gather(1, wanted).mean()
        found[way.name, way.bits] = float(total) / last
    return found
