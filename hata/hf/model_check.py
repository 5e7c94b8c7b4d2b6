"""Holding an attached model against its own answers, with a budget that leaves nothing out."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from hata.errors import AttachError
from hata.hf.attention import HashedAttention
from hata.hf.intercept import Function, Handler, Interception, handler_of

_PROMPT = 24
_NEW = 4
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
    """Generate a few tokens every way, attached and not; see `hata.hf.check_model`.

    `attached` attaches the model, hashing every layer however short the context is, with a budget
    that covers it.

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
    options, padded = WAYS[way]
    inputs = _prompt(model, padded)
    try:
        own = _answer(model, inputs, options)
    # The model itself cannot do this, for reasons that only its own code knows.
    except Exception as error:
        told = str(error).strip().partition("\n")[0]
        return Checked(way, 0, f"the model itself cannot: {type(error).__name__}: {told}")
    where, compared = f"check: {type(model).__name__}, {way}", []
    with attached(), closing(_watch(model, where, compared)):
        got = _answer(model, inputs, options)
    # Up to the first token that the two could choose differently; errors of layers add up.
    for step, (ours, theirs) in enumerate(zip(got, own, strict=True)):
        error = _error(ours, theirs)
        if not error <= 20 * _TOLERANCE[model.dtype]:
            raise AttachError(
                f"{where}: its logits of token {step} differ by {error:.1%} of the largest, though "
                "no layer does where it is hashed; it looks at something that attaching changed, "
                "so leave it unattached"
            )
        if not torch.equal(ours.argmax(-1), theirs.argmax(-1)):
            break
    return Checked(way, len(compared), "")


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, as a share of the largest number expected."""
    got, expected = got.float(), expected.float()
    return float((got - expected).abs().amax() / expected.abs().amax().clamp_min(1e-6))


def _answer(model: Any, inputs: dict[str, torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
    """The logits of each new token, `[tokens, B, V]`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(
            **inputs,
            **options,
            max_new_tokens=_NEW,
            min_new_tokens=_NEW,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.stack(out.logits)


def _prompt(model: Any, padded: bool) -> dict[str, torch.Tensor]:
    """Tokens drawn from the vocabulary, the same every time."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1 + padded, _PROMPT), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, : _PROMPT // 3] = 0
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def _watch(model: Any, where: str, compared: list[int]) -> Interception:
    """Compare every hashed step with what the model's own function makes of it."""

    def both(
        handler: Handler, own: Function, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        ran: list[bool] = []

        def dense(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
            ran.append(True)
            return own(*args, **kwargs)

        dense.__module__ = getattr(getattr(own, "func", own), "__module__", "")
        got = handler(dense, module, args, kwargs)
        if not ran:
            compared.append(module.layer_idx)
            expected = own(module, *args, **kwargs)[0]
            error = _error(got[0], expected)
            if not error <= _TOLERANCE[expected.dtype]:
                raise AttachError(
                    f"{where}: hash attention over all keys differs from the model's own attention "
                    f"from layer {module.layer_idx} on, by {error:.1%} of its largest output; this "
                    "model's attention does more than is known; leave the layer dense with "
                    "selection="
                )
        return got

    return Interception(
        {
            module: functools.partial(both, handler)
            for module in model.modules()
            if (handler := handler_of(module)) is not None
            and isinstance(getattr(handler, "__self__", None), HashedAttention)
        }
    )
