"""What a run is to do: the command line held against what is here."""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hata import device as devices
from hata import plugins, registry
from hata.backend import Backend
from hata.calibration.text import read_text
from hata.device import Fingerprint
from hata.encoder import Encoder
from hata.errors import BackendUnavailable, EncoderError, HataError, ProfileError
from hata.problem import Problem
from hata.profile import EncoderKey, cache_root, default_output, safe_output
from tune import capture, database, space
from tune.space import Layout

RANDOM_BITS, RANDOM_SEED = 256, 0


class UsageError(HataError, ValueError):
    """The command line asks for something that cannot be done."""


@dataclass
class Task:
    """What a run is to do.

    Attributes:
        fingerprint: The device, with the kernels that are tuned.
        backends, problems: What to tune, by name; the first also measures selections.
        encoder, encoder_key: What selections are chosen with, and its name in the profile.
        text: What the model reads; `""` without a model.
        storage: URL of the studies.
        notes: What people should be told.
    """

    options: argparse.Namespace
    fingerprint: Fingerprint
    backends: list[Backend]
    layout: Layout
    encoder: Encoder
    encoder_key: EncoderKey
    text: str
    problems: dict[str, list[Problem]]
    out: Path
    storage: str
    notes: list[str]


def _check_numbers(options: argparse.Namespace) -> None:
    """Refuse values that mean nothing, or that do not go together."""
    if not 0 < options.quality <= 1:
        raise UsageError(f"--quality: got {options.quality}, expected a share, 0 < Q <= 1")
    if options.trials is not None and options.trials < 1:
        raise UsageError(f"--trials: got {options.trials}, expected 1 or more")
    if options.budget is not None and not 0 < options.budget < math.inf:
        raise UsageError(f"--budget: got {options.budget}, expected seconds above 0")
    for name in ("text", "encoder"):
        if options.model is None and getattr(options, name) is not None:
            raise UsageError(f"--{name}: got one, but no --model; name the model it is for")
    if options.model is not None and not options.text:
        raise UsageError(
            "--text: got none, expected text for the model to read; name files that are like "
            "what it will be used on, or leave --model out"
        )


def make_task(options: argparse.Namespace) -> Task:
    """Find out what is here and what is asked for; raises `HataError` if it cannot be done."""
    _check_numbers(options)
    notes: list[str] = []
    try:
        out = safe_output(options.out) if options.out else None
    except ProfileError as error:
        # The library calls it an output.
        raise UsageError(f"--out: {str(error).removeprefix('output: ')}") from None
    device, backends = _choose_backends(options.gpu, options.backend, notes)
    layout, text = space.COMMON, ""
    if options.model is not None:
        layout = capture.load_layout(options.model)
        text = read_text(options.text)
        # Said now rather than after minutes.
        capture.token_sequences(options.model, text, 1, layout.context)
    encoder, encoder_key = _choose_encoder(options.encoder, layout)
    problems, kernels, sound = {}, {}, []
    for backend in backends:
        wanted = space.problems(
            space.Grid(layout, device, encoder.key_norms),
            space.dtypes_of(layout, device, backend.dtypes),
            bits=space.bits_of(encoder.bits),
            of_model=options.model is not None,
            quick=options.quick,
        )
        try:
            with plugins.blamed(f"backend {backend.name!r} failed", BackendUnavailable):
                can = [p for p in wanted if not backend.unsupported(p)]
                reasons = [] if can else backend.unsupported(wanted[0])
                hashes = {op: backend.kernel_hash(op) for op in sorted({p.op for p in can})}
                for problem in can:
                    backend.tunables(problem.op, problem)
        except BackendUnavailable as error:
            if len(backends) == 1:
                raise
            notes.append(str(error))
            continue
        sound.append(backend)
        problems[backend.name], kernels[backend.name] = can, hashes
        if not can:
            notes.append(f"backend {backend.name} cannot run these problems: {'; '.join(reasons)}")
    if not sound:
        raise BackendUnavailable(f"no backend can be tuned for {device} here: {'; '.join(notes)}")
    fingerprint = dataclasses.replace(devices.fingerprint(device), kernels=kernels)
    return Task(
        options=options, fingerprint=fingerprint, backends=sound, layout=layout,
        encoder=encoder, encoder_key=encoder_key, text=text, problems=problems,
        out=out or default_output(fingerprint), notes=notes,
        storage=database.storage_url(options.storage, cache_root() / "tune" / "studies.db"),
    )  # fmt: skip


def _choose_backends(gpu: str, name: str | None, notes: list[str]) -> tuple[str, list[Backend]]:
    """The device to tune for, and the backends that run on it."""
    name = None if name == "auto" else name
    here = devices.has_cuda()
    infos = registry.list_backends()
    absent = "; ".join(f"{i.name}: {i.reason}" for i in infos if not i.available)
    usable = []
    # Unknown and unavailable names say so themselves.
    for candidate in [i.name for i in infos if i.available] if name is None else [name]:
        try:
            backend = registry.load(candidate)
            # Of one without knobs, such as the reference, nothing can be tuned.
            if name is not None or type(backend).tunables is not Backend.tunables:
                usable.append(backend)
        except BackendUnavailable as error:
            # A plug-in is somebody else's code, and must not stop the others.
            if name is not None:
                raise BackendUnavailable(f"--backend: {error}") from None
            notes.append(str(error))

    kind, device = gpu.lower(), "cpu"
    if kind == "auto":
        if here and any("cuda" in backend.devices for backend in usable):
            device = "cuda"
        elif here and name is None:
            notes.append(f"A GPU is here, but no backend for it ({absent}); tuning the CPU.")
    elif kind != "cpu":
        device = "cuda"
        found = devices.fingerprint("cuda").name if here else ""
        if kind not in found.lower().replace(" ", "-") and kind not in found.lower():
            what = f"a {found}" if here else f"no GPU, only {devices.fingerprint('cpu').name}"
            raise UsageError(
                f"--gpu: got {gpu!r}, but here is {what}; tune what is here with --gpu auto, or "
                f"run this command on a machine with a {gpu} and copy the profile it writes: "
                "HATA_PROFILE=<file>, or hata.use_profile(<file>)"
            )
    chosen = [backend for backend in usable if device in backend.devices]
    if not chosen and name is not None:
        raise BackendUnavailable(
            f"--backend: {name} runs on {' and '.join(sorted(usable[0].devices))}, but --gpu "
            f"{gpu} means {device} here; change one of them"
        )
    if not chosen:
        raise BackendUnavailable(f"no backend can be tuned for {device} here ({absent})")
    return device, chosen


def _choose_encoder(name: str | None, layout: Layout) -> tuple[Encoder, EncoderKey]:
    shape = {
        "model_type": layout.model_type,
        "num_hidden_layers": layout.layers,
        "num_attention_heads": layout.heads,
        "num_key_value_heads": layout.kv_heads,
        "head_dim": layout.head_dim,
    }
    if name not in (None, "random"):
        encoder = Encoder.load(str(name))
        encoder.check(shape)
        if any(p is not None and len(p) != layout.kv_heads for p in encoder.projections):
            raise EncoderError(
                f"--encoder: {name} hashes keys once per query head, which the tuner does not "
                "measure; learn one that hashes them once per KV head: hata learn"
            )
        return encoder, EncoderKey(Path(str(name)).name, encoder.bits)
    if layout is space.COMMON:
        # The synthetic set is one layer.
        shape["num_hidden_layers"] = 1
    encoder = Encoder.random(shape, RANDOM_BITS, RANDOM_SEED)
    return encoder, EncoderKey("random", RANDOM_BITS, RANDOM_SEED)


def check_folder(out: Path) -> None:
    """Raise `UsageError` where a file could not be written."""
    folder = out.parent
    while not folder.exists():
        folder = folder.parent
    try:
        # Permissions do not tell: of a superuser, or of a file system that takes no files.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{out.name}.", suffix=".tmp"):
            pass
    except OSError as error:
        raise UsageError(
            f"--out: {out} cannot be written ({folder}: {error.strerror or error}); choose another "
            "place"
        ) from None
