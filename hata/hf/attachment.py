"""`attach`: hash attention in a transformers model, and back."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Literal

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from hata.encoder import Encoder
from hata.errors import AttachError
from hata.hf import models
from hata.hf.handle import Handle
from hata.hf.layer_plan import DensePlan, LayerPlan
from hata.hf.model_check import Checked, compare
from hata.hf.model_selections import EncoderLike, ProfileLike, SelectionLike, load_encoder, resolve
from hata.selection import Selection

TESTED = ((5, 17), (5, 24))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attach(
    model: nn.Module,
    encoder: EncoderLike = "random",
    *,
    profile: ProfileLike = None,
    selection: SelectionLike | Literal["auto"] | None = "auto",
    strict: bool = False,
    check: bool | None = None,
    graphs: bool = True,
) -> Handle:
    """Let a model decode with hash attention.

    Afterwards plain `model.generate()` (and `model(...)`) attends, in every step of one token, to
    the keys whose codes are nearest to the query's, where the context is longer than the budget.
    Everything else runs the model's own attention: prefill and every step of several tokens, layers
    with a sliding window, masks with holes, training and any step that records gradients.
    `handle.report()` tells what each layer did. A planned layer that has to attend densely for a
    reason that was not planned warns once for each reason.

    Args:
        model: A decoder of transformers whose attention goes through its attention interface, or a
            module that wraps one (`torch.compile(model)`, `DataParallel`, a PEFT model).
        encoder: Path of an encoder file, a `hata.Encoder`, or `"random"` for the untrained one.
        profile: Where selections are looked up: a path or a `hata.profile.Profile`; `None`: the
            profile in force. Kernel configurations always come from the profile in force, see
            `hata.use_profile`.
        selection: One `hata.Selection` for all layers, or one per layer with `None` for a dense
            one; `None`: all layers are dense, and decode from the cache as it lies. `"auto"`: the
            profile's selections for this model, else `DEFAULT_SELECTION` (with the bits of the
            encoder where one is given).
        strict: Raise instead of warning.
        graphs: Run steps of one token from CUDA graphs where that can be (`hata.hf.step_graph`).
        check: Run `hata.hf.check_model` first. `None`: only where the model is of no family that is
            tested (docs/models.md).

    Returns:
        A handle. `handle.detach()`, or leaving `with attach(model):`, undoes everything. A copy of
        an attached model (`copy.deepcopy`) is attached on its own; `detach(copied)` undoes that.

    Raises:
        AttachError: The model cannot be attached to, already is, or fails its check; with `strict`
            also where no layer can be hashed.
        EncoderError: The encoder is another model's, damaged, or has too few bits.
        ProfileError: The profile cannot be read.

    Example:
        >>> import hata.hf
        >>> with hata.hf.attach(model, selection=hata.Selection(bits=128, k=512)):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    _check_version(transformers.__version__)
    model, _, _ = _parts(model)
    untested = check is None and not models.is_tested(model.config)
    if untested and not model.can_generate():
        warnings.warn(
            f"{type(model).__name__}: this family is not tested, and cannot be checked either, "
            "because this part of it does not generate; attach the model with its output layer",
            stacklevel=2,
        )
    elif check or untested:
        with warnings.catch_warnings():
            # Whatever there is to say is said below.
            warnings.simplefilter("ignore")
            check_model(model, encoder)
    return _attach(model, encoder, profile, selection, strict, graphs=graphs)


def _attach(
    model: PreTrainedModel,
    encoder: EncoderLike,
    profile: ProfileLike,
    selection: SelectionLike | Literal["auto"] | None,
    strict: bool,
    forced: bool = False,
    graphs: bool = True,
) -> Handle:
    """`attach`; `forced` hashes however short the context is."""
    model, decoder, modules = _parts(model)
    config = decoder.config.get_text_config()
    name = Path(str(getattr(model, "name_or_path", ""))).name
    made, selections, source = resolve(config, name, encoder, profile, selection)
    if made.shape.head_dim % 16:
        raise AttachError(
            f"model: got {type(model).__name__} with head size {made.shape.head_dim}, "
            "supported are the multiples of 16"
        )
    if model.dtype not in _DTYPES:
        raise AttachError(
            f"model: got {type(model).__name__} in {model.dtype}, supported are "
            f"{', '.join(map(str, _DTYPES))}; convert it with model.to(dtype)"
        )
    layers: list[LayerPlan | DensePlan | str] = []
    for i, (chosen, why) in enumerate(zip(selections, models.why_dense(config), strict=True)):
        why = why or ("" if i in modules else models.NO_ATTENTION)
        if why:
            layers.append(why)
            continue
        if chosen is None:
            plan = DensePlan("its selection says so")
        else:
            plan = LayerPlan(made, i, chosen, forced)
        place = next(modules[i][0].parameters(), None)
        if place is not None and place.device.type != "meta":
            plan.on(torch.empty(0, dtype=model.dtype, device=place.device))
        layers.append(plan)
    dense = [str(getattr(one, "why", one)) for one in layers if not isinstance(one, LayerPlan)]
    if len(dense) == len(layers) and selection is not None:
        every = "; ".join(dict.fromkeys(dense))
        told = f"{type(model).__name__}: no layer will use hash attention: {every}"
        if strict:
            raise AttachError(told)
        warnings.warn(told, stacklevel=3)
    return Handle(model, modules, made, layers, strict, source, graphs)


def check_model(model: nn.Module, encoder: EncoderLike = "random") -> list[Checked]:
    """Hold a model with hash attention against its own answers, nothing left out.

    A few tokens are generated with a dynamic cache, with a static one, and from two prompts of
    which one has left padding. Every layer that can be hashed is, with a budget that covers the
    context, and every hashed step is compared with what the model's own attention makes of it.

    Args:
        model: As for `attach`; not attached.
        encoder: As for `attach`.

    Returns:
        For each way, how many steps of layers were compared, or why it could not be tried.

    Raises:
        AttachError: They differ; names the layer where it begins.
    """
    inner, _, _ = _parts(model)
    made = load_encoder(encoder) or Encoder.random(inner.config, 64)
    every = Selection(bits=made.bits, k=4096, dense_layers=0)
    return compare(inner, lambda: _attach(inner, made, None, every, strict=False, forced=True))


def detach(model: nn.Module) -> None:
    """Give a model its own attention back, whoever holds its handle; else does nothing.

    Args:
        model: One that was attached, or a copy of one, which no handle was returned for.

    Raises:
        AttachError: It is no model of transformers.
    """
    handle = vars(models.inside(model).get_decoder()).get("_hata_handle")
    if handle is not None:
        handle.detach()


def _parts(model: nn.Module) -> tuple[PreTrainedModel, PreTrainedModel, dict[int, list[nn.Module]]]:
    """A model unwrapped, its decoder, and the attention modules of each layer."""
    inner = models.inside(model)
    decoder = models.decoder_of(inner)
    return inner, decoder, models.attention_modules(decoder, type(inner).__name__)


@functools.cache
def _check_version(version: str) -> None:
    """Warn, once, of a release of transformers that hata is not tested with."""
    if not TESTED[0] <= tuple(int(part) for part in version.split(".")[:2]) <= TESTED[1]:
        low, high = (".".join(map(str, bound)) for bound in TESTED)
        warnings.warn(
            f"transformers {version} is outside the range hata is tested with, {low} to {high}",
            stacklevel=3,
        )
