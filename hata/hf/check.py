"""Holding an attached model against its own answers, with a budget that leaves nothing out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from hata.errors import AttachError
from hata.hf.attention import HashedAttention
from hata.hf.intercept import Function, Handler, Interception, handler_of

PROMPT = 24
NEW = 4
# Largest error of a layer's output, as a share of its size: a few roundings of the dtype.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
WAYS = {
    "dynamic": ({}, False),
    "static": ({"cache_implementation": "static", "disable_compile": True}, False),
    "left padding": ({}, True),
}


class Checked(NamedTuple):
    """What one way of generating showed.

    Attributes:
        way: One of `WAYS`.
        hashed: Steps of layers that ran hash attention and were compared.
        note: Why it could not be tried; `""` where it was.
    """

    way: str
    hashed: int
    note: str


def compare(
    model: PreTrainedModel, attached: Callable[[], AbstractContextManager[Any]]
) -> list[Checked]:
    """Generate a few tokens every way, attached and not.

    Args:
        model: What generates; not attached.
        attached: Attaches it, hashing every layer however short the context is, with a budget that
            covers it.

    Raises:
        AttachError: An answer differs; names the way and the layer where it begins.
    """
    if not model.can_generate():
        raise AttachError(
            f"check: {type(model).__name__} cannot generate; pass the model with its output layer"
        )
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return [_compared(model, attached, way) for way in WAYS]
    finally:
        for module, training in modes:
            module.training = training


def _compared(model: Any, attached: Callable[[], Any], way: str) -> Checked:
    kwargs, padded = WAYS[way]
    inputs = _prompt(model, padded)
    try:
        own = _answer(model, inputs, kwargs)
    # The model itself cannot do this, for reasons that only its own code knows.
    except Exception as error:
        told = str(error).strip().partition("\n")[0]
        return Checked(way, 0, f"the model itself cannot: {type(error).__name__}: {told}")
    with attached(), _watched(model, way) as compared:
        got = _answer(model, inputs, kwargs)
        hashed = len(compared)
    _compare_logits(type(model).__name__, way, own, got, _TOLERANCE[model.dtype])
    return Checked(way, hashed, "")


def _compare_logits(
    model: str, way: str, own: torch.Tensor, got: torch.Tensor, tolerance: float
) -> None:
    """Up to the first token that the two could choose differently; errors of layers add up."""
    for step, (ours, theirs) in enumerate(zip(got, own, strict=True)):
        error = float((ours - theirs).abs().amax() / theirs.abs().amax().clamp_min(1e-6))
        if not error <= 20 * tolerance:
            raise AttachError(
                f"check: {model}, {way}: its logits of token {step} differ by {error:.1%} of the "
                "largest, though no layer does where it is hashed; it looks at something that "
                "attaching changed, so leave it unattached"
            )
        if not torch.equal(ours.argmax(-1), theirs.argmax(-1)):
            return


def _answer(model: Any, inputs: dict[str, torch.Tensor], kwargs: dict[str, Any]) -> torch.Tensor:
    """The logits of each new token, `[tokens, B, V]`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(
            **inputs,
            **kwargs,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.stack(out.logits).float()


def _prompt(model: Any, padded: bool) -> dict[str, torch.Tensor]:
    """Tokens drawn from the vocabulary, the same every time."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1 + padded, PROMPT), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, : PROMPT // 3] = 0
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


@contextmanager
def _watched(model: Any, way: str) -> Iterator[list[int]]:
    """Compare every hashed step with what the model's own function makes of it."""
    compared: list[int] = []
    name = type(model).__name__
    handlers: dict[Any, Handler] = {}
    for module in model.modules():
        handler = handler_of(module)
        if handler is not None and isinstance(getattr(handler, "__self__", None), HashedAttention):
            handlers[module] = _Compared(handler, name, way, compared).answer
    interception = Interception(handlers)
    try:
        yield compared
    finally:
        interception.close()


class _Compared:
    """A handler that computes both answers, and compares those that were hashed."""

    def __init__(self, inner: Handler, model: str, way: str, compared: list[int]) -> None:
        self._inner = inner
        self._model = model
        self._way = way
        self._compared = compared

    def answer(
        self, own: Function, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        """See `hata.hf.intercept.Handler`."""
        ran: list[bool] = []

        def dense(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
            ran.append(True)
            return own(*args, **kwargs)

        dense.__module__ = getattr(getattr(own, "func", own), "__module__", "")
        got = self._inner(dense, module, args, kwargs)
        if not ran:
            expected = own(module, *args, **kwargs)
            self._compare(module.layer_idx, expected[0], got[0])
        return got

    def _compare(self, layer: int, expected: torch.Tensor, got: torch.Tensor) -> None:
        self._compared.append(layer)
        size = expected.float().abs().amax().clamp_min(1e-6)
        error = float((expected.float() - got.float()).abs().amax() / size)
        if not error <= _TOLERANCE[expected.dtype]:
            raise AttachError(
                f"check: {self._model}, {self._way}: hash attention over all keys differs from the "
                f"model's own attention from layer {layer} on, by {error:.1%} of its largest "
                "output; this model's attention does more than is known; leave the layer dense "
                "with selection="
            )
