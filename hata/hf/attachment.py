"""`attach`: hash attention in a transformers model, and back."""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from hata.encoder import Encoder
from hata.errors import AttachError
from hata.hf import models, passes, report
from hata.hf.attention import HashedAttention
from hata.hf.cache import HashDynamicLayer, HashStaticLayer
from hata.hf.check import Checked, compare
from hata.hf.intercept import Interception
from hata.hf.padding import is_known, is_left_padding
from hata.hf.plan import LayerPlan
from hata.hf.policy import load_encoder, resolve
from hata.hf.report import LayerRecord, LayerReport, Record, Report
from hata.profile import Profile
from hata.selection import Selection
from hata.words import ranges

TESTED = ((5, 17), (5, 24))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_version_known = False


def attach(
    model: nn.Module,
    encoder: Encoder | str | os.PathLike[str] = "random",
    *,
    profile: Profile | str | os.PathLike[str] | None = None,
    selection: Selection | Sequence[Selection | None] | None = None,
    strict: bool = False,
    check: bool | None = None,
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
            one. Without it the profile's selections for this model count, else
            `DEFAULT_SELECTION` (with the bits of the encoder where one is given).
        strict: Raise instead of warning.
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
    _check_version()
    model = models.inside(model)
    models.attention_modules(models.decoder_of(model), type(model).__name__)
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
    return _attach(model, encoder, profile, selection, strict)


def _attach(
    model: PreTrainedModel,
    encoder: Encoder | str | os.PathLike[str],
    profile: Profile | str | os.PathLike[str] | None,
    selection: Selection | Sequence[Selection | None] | None,
    strict: bool,
    forced: bool = False,
) -> Handle:
    """`attach`; `forced` hashes however short the context is."""
    decoder = models.decoder_of(model)
    modules = models.attention_modules(decoder, type(model).__name__)
    config = decoder.config.get_text_config()
    name = Path(str(getattr(model, "name_or_path", ""))).name
    policy = resolve(config, name, encoder, profile, selection)
    if policy.encoder.shape.head_dim % 16:
        raise AttachError(
            f"model: got {type(model).__name__} with head size {policy.encoder.shape.head_dim}, "
            "supported are the multiples of 16"
        )
    if model.dtype not in _DTYPES:
        raise AttachError(
            f"model: got {type(model).__name__} in {model.dtype}, supported are "
            f"{', '.join(map(str, _DTYPES))}; convert it with model.to(dtype)"
        )
    layers = []
    for i, (chosen, why) in enumerate(
        zip(policy.selections, models.why_dense(config), strict=True)
    ):
        why = why or ("" if i in modules else models.NO_ATTENTION)
        why = why or ("its selection says so" if chosen is None else "")
        if chosen is None or why:
            layers.append(_Layer(None, why))
            continue
        plan = LayerPlan(policy.encoder, i, chosen, forced)
        place = next(modules[i][0].parameters(), None)
        if place is not None and place.device.type != "meta":
            plan.on(torch.empty(0, dtype=model.dtype, device=place.device))
        layers.append(_Layer(plan, ""))
    if not any(layer.plan for layer in layers):
        told = (
            f"{type(model).__name__}: no layer will use hash attention: "
            f"{'; '.join(dict.fromkeys(layer.why for layer in layers))}"
        )
        if strict:
            raise AttachError(told)
        warnings.warn(told, stacklevel=3)
    return Handle(model, policy.encoder, layers, strict, policy.source)


def check_model(
    model: nn.Module, encoder: Encoder | str | os.PathLike[str] = "random"
) -> list[Checked]:
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
    inner = models.inside(model)
    models.attention_modules(models.decoder_of(inner), type(inner).__name__)
    made = load_encoder(encoder) or Encoder.random(inner.config, 64)
    every = Selection(bits=made.bits, k=4096, dense_layers=0)

    def attached() -> Handle:
        return _attach(inner, made, None, every, strict=False, forced=True)

    return compare(inner, attached)


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


class _Layer(NamedTuple):
    """What is planned for a layer: how it hashes, or why it is dense."""

    plan: LayerPlan | None
    why: str


class Handle:
    """An attachment; undo it with `detach()` or by leaving its `with` block.

    Attributes:
        selections: One per layer; `None` for a layer that is planned dense.
        encoder: The encoder in use.
        source: Where the selections come from, for people.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        layers: Sequence[_Layer],
        strict: bool,
        source: str,
    ) -> None:
        self.encoder = encoder
        self.source = source
        self.selections = tuple(layer.plan and layer.plan.selection for layer in layers)
        self._name = type(model).__name__
        self._model = model
        self._decoder = decoder = model.get_decoder()
        self._layers = tuple(layers)
        self._plans = [(i, layer.plan) for i, layer in enumerate(layers) if layer.plan is not None]
        self._record = Record(self._name, strict)
        self._records = {i: LayerRecord(self._record, i) for i, _ in self._plans}
        self._arguments = list(inspect.signature(decoder.forward).parameters)
        self._attached = True
        self._interception = Interception(
            {
                module: HashedAttention(plan, self._records[i]).answer
                for i, plan in self._plans
                for module in models.attention_modules(decoder)[i]
            }
        )
        vars(decoder)["_hata_handle"] = self
        self._hooks: list[Any] = []
        if self._plans:
            self._hooks = [
                decoder.register_forward_pre_hook(self._before, with_kwargs=True),
                decoder.register_forward_hook(self._after, always_call=True),
            ]
            if hasattr(model, "prepare_inputs_for_generation"):
                vars(model)["prepare_inputs_for_generation"] = _Prepare(self, model)

    def detach(self) -> None:
        """Give the model its own attention back; a second call does nothing.

        Caches that were used meanwhile stay valid, for this model and for a later attachment.
        """
        if not self._attached:
            return
        self._attached = False
        for hook in self._hooks:
            hook.remove()
        self._interception.close()
        vars(self._decoder).pop("_hata_handle", None)
        prepare = vars(self._model).get("prepare_inputs_for_generation")
        if isinstance(prepare, _Prepare):
            prepare.leave(self._model)

    def report(self) -> Report:
        """What every layer did since it was attached, counted where Python ran it."""
        return Report(
            self._name,
            tuple(
                self._records[i].told(layer.plan.selection)
                if layer.plan is not None
                else LayerReport(i, None, layer.why, 0, {}, 0, ())
                for i, layer in enumerate(self._layers)
            ),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        # Part of the copy of a model: all that belongs to the copy is copied with it.
        twin = memo[id(self)] = object.__new__(Handle)
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __reduce__(self) -> Any:
        raise AttachError(
            f"model: this {self._name} is attached and cannot be pickled; detach it first, or save "
            "it with save_pretrained"
        )

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        hashed = [chosen for chosen in self.selections if chosen is not None]
        dense = [str(i) for i, chosen in enumerate(self.selections) if chosen is None]
        left = f" (dense: {', '.join(dense)})" if hashed and dense else ""
        state = "attached" if self._attached else "detached"
        return (
            f"<hata.hf.Handle {state} {self._name}: {len(hashed)} of {len(self.selections)} layers "
            f"planned to hash{left}, {self.encoder!r}, selections ({self.source})>"
        )

    def __str__(self) -> str:
        lines = [repr(self)]
        for chosen in dict.fromkeys(self.selections):
            layers = [i for i, other in enumerate(self.selections) if other == chosen]
            lines.append(f"  layers {ranges(layers)}: {'dense' if chosen is None else chosen}")
        lines += ["so far:", str(self.report())]
        return "\n".join(lines)

    def _before(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the decoder: look at the arguments of this pass; change none."""
        if args:
            kwargs = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        weights = kwargs.get("output_attentions")
        if weights is None:
            weights = getattr(decoder.config, "output_attentions", False)
        step = passes.current()
        step.begin(kwargs.get("attention_mask") is not None, bool(weights))
        cache = models.cache_among(kwargs)
        if cache is not None:
            if torch.compiler.is_compiling():
                from torch._dynamo.comptime import comptime

                comptime(_take_over_now)
            step.why = self._take_over(cache)
        elif kwargs.get("use_cache", decoder.config.use_cache) is False:
            step.why = report.NO_CACHE

    def _after(self, decoder: Any, args: Any, output: Any) -> None:
        """Forward hook of the decoder, also after an exception."""
        passes.current().end()
        if self._record.met or output is None or torch.compiler.is_compiling():
            return
        if self._interception.is_in_place():
            self._record.complain(self._plans[0][0], report.NEVER_CALLED)

    def prepared(self, made: dict[str, Any]) -> None:
        """Look at the inputs that were made for a step.

        A compiled step cannot look at the values of its mask, and would compile the taking over of
        its cache as well.
        """
        cache = models.cache_among(made)
        if cache is None or not getattr(cache, "is_compileable", False):
            return
        self._take_over(cache)
        mask = made.get("attention_mask")
        mask = mask.get("full_attention") if isinstance(mask, dict) else mask
        inputs = made.get("input_ids")
        inputs = made.get("inputs_embeds") if inputs is None else inputs
        if isinstance(mask, torch.Tensor) and is_known(mask) and inputs is not None:
            self._foresee(cache, mask, inputs.shape[1])

    def _foresee(self, cache: Cache, mask: torch.Tensor, tokens: int) -> None:
        """Look at a mask before the step that is given it."""
        layers = [cache.layers[i] for i, _ in self._plans if i < len(cache.layers)]
        layers = [layer for layer in layers if isinstance(layer, HashStaticLayer)]
        if not layers or not (tokens > 1 or layers[0].left_padded is None):
            return
        found = is_left_padding(mask, layers[0].total() + tokens)
        for layer in layers:
            if tokens > 1:
                layer.foreseen = found
            else:
                layer.left_padded = found

    def _take_over(self, cache: Cache) -> str | None:
        """Give the cache layers that carry codes, in place; what they hold stays theirs.

        Returns:
            Why that cannot be done for all of them.
        """
        if not hasattr(cache, "layers"):
            return f"a cache of another kind: {type(cache).__name__}"
        if getattr(cache, "offloading", False):
            return "an offloaded cache"
        why = None
        layers: list[Any] = cache.layers
        if cache.layer_class_to_replicate is DynamicLayer:
            # This cache makes its layers as they are first used.
            while len(layers) <= self._plans[-1][0]:
                layers.append(DynamicLayer())
        for i, plan in self._plans:
            layer: Any = layers[i] if i < len(layers) else None
            kind: Any = type(layer)
            if kind is HashDynamicLayer or kind is HashStaticLayer:
                if layer.plan is not plan:
                    layers[i] = kind(plan, layer)
            elif kind is DynamicLayer:
                layers[i] = HashDynamicLayer(plan, layer)
            elif kind is StaticLayer:
                layers[i] = HashStaticLayer(plan, layer)
            else:
                why = f"a cache layer of another kind: {kind.__name__}"
        return why


class _Prepare:
    """`prepare_inputs_for_generation` of an attached model: where masks of compiled steps are made.

    It has the signature of the model's own, which transformers looks at.
    """

    def __init__(self, handle: Handle, model: Any) -> None:
        self._handle = handle
        # One that somebody has set on this very model.
        self._set = vars(model).get("prepare_inputs_for_generation")
        self._own = model.prepare_inputs_for_generation
        self.__signature__ = inspect.signature(self._own)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        made = self._own(*args, **kwargs)
        self._handle.prepared(made)
        return made

    def leave(self, model: Any) -> None:
        """Give the model its own back."""
        del vars(model)["prepare_inputs_for_generation"]
        if self._set is not None:
            vars(model)["prepare_inputs_for_generation"] = self._set


def _take_over_now(context: Any) -> None:
    """Take a cache over while torch.compile follows the code, and not in what it compiles.

    Else the first step would be a graph of its own, which makes all codes.
    """
    handle, cache = (
        context.get_local(name)._i_will_not_complain_if_bc_breaks_VariableTracker().realize()
        for name in ("self", "cache")
    )
    handle.value._take_over(cache.value)


def _check_version() -> None:
    global _version_known
    if _version_known:
        return
    _version_known = True
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not TESTED[0] <= version <= TESTED[1]:
        low, high = (".".join(map(str, bound)) for bound in TESTED)
        warnings.warn(
            f"transformers {transformers.__version__} is outside the range hata is tested with, "
            f"{low} to {high}",
            stacklevel=3,
        )
