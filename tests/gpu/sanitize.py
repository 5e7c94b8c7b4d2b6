"""Every kernel once, on small and awkward shapes: what a memory checker is to watch.

    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
    compute-sanitizer --tool racecheck python tests/gpu/sanitize.py

Results are held against the reference as well. Run it once by itself before, so that kernels are
compiled and cached. torch hands out memory of its own for every tensor here, so that a read behind
the end of one is not one of its neighbour.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import warnings
from dataclasses import replace

# Before torch is imported.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import pytest

import hata
from hata import registry
from hata.backend import Backend, Config, use_config
from hata.measure.arrays import TorchKit
from hata.problem import OPS
from hata.testing import BackendSuite
from hata.testing.strategies import Case

BASE = Case(
    seed=5, dtype="bfloat16", batch=2, kv_heads=2, group=4, code_group=4, slots=333, head_dim=128,
    value_dim=128, bits=128, k=40, lengths=(333, 71), fresh=2,
)  # fmt: skip
CASES = {
    "a step": BASE,
    "float16, heads of 80, tokens": replace(
        BASE, dtype="float16", head_dim=80, value_dim=48, tokens=3
    ),
    "float32, key norms": replace(BASE, dtype="float32", norms=True, head_dim=64, value_dim=64),
    "short codes": replace(BASE, bits=64, slots=334),
    "shortest codes, odd slots": replace(BASE, bits=32, group=7, code_group=7),
    "long codes, single heads": replace(BASE, bits=512, group=1, code_group=1, head_dim=16),
    "per head": replace(BASE, per_head=True, code_group=4, norms=True),
    "given codes, guards": replace(BASE, given_codes=True, code_group=3, sink=2, recent=5),
    "soft cap, sinks, ratio": replace(BASE, softcap=9.0, sinks=True, ratio=0.3, bias=True),
    "everything": replace(BASE, k=400, dense_below=100, starts=(3, 0)),
    "latent heads": replace(
        BASE, kv_heads=1, group=16, code_group=16, head_dim=576, value_dim=512, bits=256
    ),
    "no vectors": replace(BASE, layouts=("offset", "padded")),
    "no keys": replace(BASE, lengths=(0, 1)),
    "more keys than a tile": replace(BASE, slots=9001, k=700, lengths=(9001, 4100), flavour="few"),
}


def choices(backend: Backend, suite: BackendSuite, kit: TorchKit, op: str) -> list:
    """The default configuration, and one for every other value of knobs that change the way.

    Those are what is no number, and how far a scan reads ahead.
    """
    problem = suite.problem_of(kit, BASE, op)
    default = dict(backend.default(problem))
    knobs = backend.tunables(op, problem)
    if 0 in knobs.get("num_splits", ()):
        # Left to itself, a row of so few keys is one block's.
        default["num_splits"] = 4
    variants = {
        name: values
        for name, values in knobs.items()
        if name == "prefetch" or not all(type(v) is int for v in values)
    }
    return [default] + [
        {**default, name: value}
        for name, values in variants.items()
        for value in values
        if value != default[name]
    ]


def checked(suite: BackendSuite, kit: TorchKit, op: str, case: Case, config: Config) -> str:
    """What came of one check, in words."""
    # The default sizes of another problem may differ, so only what is varied is forced.
    force = use_config(suite.backend, op, config) if case is BASE else contextlib.nullcontext()
    try:
        with force:
            getattr(suite, f"check_{op}")(kit, case)
    except pytest.skip.Exception as error:
        return f"skipped: {error}"
    # Whatever it is, the others are still to be looked at.
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "right"


def run(name: str, device: str, wanted: str) -> int:
    """All cases on one backend; how many were wrong."""
    # Its own fixtures need pytest; its checks do not.
    suite = type("Suite", (BackendSuite,), {"backend": name, "device": device})()
    kit, backend, wrong = TorchKit(device), registry.load(name), 0
    with hata.use_backend(name):
        for op in OPS:
            configs = choices(backend, suite, kit, op)
            for title, case in CASES.items():
                if wanted not in title:
                    continue
                # Variants on the plain step; sizes and options on the default.
                for config in configs if case is BASE else configs[:1]:
                    apart = [f"{k}={v}" for k, v in config.items() if v != configs[0][k]]
                    start = time.perf_counter()
                    told = checked(suite, kit, op, case, config)
                    wrong += told.startswith("WRONG")
                    seconds = time.perf_counter() - start
                    title_of = " ".join([title, *apart])
                    print(f"{name:10} {op:14} {title_of:32} {seconds:6.1f} s  {told}", flush=True)
    return wrong


def main() -> int:
    """Run every backend that is here; 1 if anything was wrong, 2 if there is none."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script itself")
    parser.add_argument("--backend", action="append", help="these backends only")
    parser.add_argument("--case", default="", help="cases with this in their name only")
    options = parser.parse_args()
    # Warnings about old functions of other libraries are not what is looked for.
    warnings.simplefilter("ignore")
    names = options.backend or [
        info.name
        for info in hata.list_backends()
        if info.available and options.device in registry.load(info.name).devices
    ]
    if not names:
        reasons = "; ".join(f"{info.name}: {info.reason}" for info in hata.list_backends())
        print(f"no backend runs on {options.device} here ({reasons})", file=sys.stderr)
        return 2
    wrong = sum(run(name, options.device, options.case) for name in names)
    print(f"{', '.join(names)}: {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
