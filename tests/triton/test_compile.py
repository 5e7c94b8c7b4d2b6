"""Every kernel compiles for every architecture, without a GPU; what it takes is recorded."""

import importlib
import itertools
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from hata.problem import Problem

triton = pytest.importorskip("triton", reason="the Triton backend needs it")
pytest.importorskip("torch", reason="the Triton backend needs it")

TritonBackend = importlib.import_module("hata.backends.triton").TritonBackend
splits_of = importlib.import_module("hata.backends.triton.attend").splits_of

LLAMA = {
    "device": "cuda", "heads": 32, "kv_heads": 8, "head_dim": 128, "bits": 128, "k": 2048,
    "slots": 131072,
}  # fmt: skip


def attention(dtype, projection_dtype=None, **sizes):
    """A decode step; `sizes` differ from those of Llama 3.1 8B."""
    sizes = {**LLAMA, "value_dim": 128, **sizes}
    return Problem("hash_attend", dtype=dtype, projection_dtype=projection_dtype or dtype, **sizes)


DECODE = attention("bfloat16")
ENCODE = Problem(
    "encode", "cuda", "bfloat16", "bfloat16", heads=8, kv_heads=8, head_dim=128, bits=128,
    tokens=131072, norms=True,
)  # fmt: skip
NORMS = Problem(
    "hamming_topk", "cuda", "uint8", heads=32, kv_heads=8, bits=128, k=2048, slots=131072,
    norms=True,
)  # fmt: skip
SPARSE = Problem(
    "sparse_attend", "cuda", "float16", heads=32, kv_heads=8, head_dim=64, value_dim=64, k=512,
    slots=32768, per_head=True,
)  # fmt: skip
MLA = attention("bfloat16", heads=16, kv_heads=1, head_dim=576, value_dim=512, bits=256)
ODD = attention(
    "float16", "float32", heads=7, kv_heads=1, head_dim=80, value_dim=96, bits=96, aligned=False
)  # fmt: skip
WIDE = attention("float32", heads=16, kv_heads=2, head_dim=64, value_dim=64, tokens=2, norms=True)

CASES = {
    "decode-sm80": (DECODE, 80, {}),
    "decode-sm90": (DECODE, 90, {}),
    "decode-sm100": (DECODE, 100, {}),
    "decode-sm120": (DECODE, 120, {}),
    "popcount-sm90": (DECODE, 90, {"binary_mma": False}),
    "ballot-sm90": (
        DECODE,
        90,
        {"adders": False, "binary_mma": False, "prefetch": 0, "histogram": "ballot"},
    ),
    "encode-sm80": (ENCODE, 80, {}),
    "encode-sm90": (ENCODE, 90, {}),
    "encode-sm100": (ENCODE, 100, {}),
    "norms-sm80": (NORMS, 80, {}),
    "per-head-sm90": (SPARSE, 90, {}),
    "mla-sm90": (MLA, 90, {}),
    "odd-sm90": (ODD, 90, {}),
    "odd-sm120": (ODD, 120, {}),
    "codes-of-64-sm80": (attention("bfloat16", heads=56, bits=64), 80, {}),
    "codes-of-512-sm90": (attention("bfloat16", heads=8, bits=512), 90, {}),
    "float32-sm80": (WIDE, 80, {}),
}


@pytest.fixture(scope="module", autouse=True)
def _fresh_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def resources(cubin, folder):
    """Registers, stack bytes (spills) and shared bytes of a cubin."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return {}
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True).stdout
    return dict(re.findall(r"(REG|STACK|SHARED):(\d+)", usage))


@pytest.mark.parametrize("case", CASES)
def test_kernels_compile(case, record_property, tmp_path):
    """One configuration serves every architecture: what has no use there is left out."""
    problem, architecture, options = CASES[case]
    backend = TritonBackend()
    config = {**backend.default(problem), **options}
    kernels = backend.ahead(problem, config, architecture)
    assert kernels
    texts = {}
    for kernel in kernels:
        compiled = kernel.compile(architecture)
        usage = resources(compiled.asm["cubin"], tmp_path)
        record_property(f"{kernel.fn.__name__}-{architecture}", usage)
        texts.setdefault(kernel.fn.__name__, []).append(compiled.asm["ptx"])
        # A block has 227 KB on the architectures with most, 99 KB on those with least.
        assert compiled.metadata.shared <= {80: 163, 120: 99}.get(architecture, 227) * 1024
    scans = texts.get("_scan_kernel", [])
    assert bool(scans) == ("binary_mma" in config)
    for ptx in scans:
        # Newer ones take the instruction too, but have no unit for it.
        assert ("b1.b1" in ptx) == (config["binary_mma"] and architecture <= 90)
    waiting = [name for name, found in texts.items() if any("griddepcontrol" in x for x in found)]
    assert bool(waiting) == (config.get("pdl", False) and architecture >= 90)


# Of a share that is one tile, and of a loop over tiles.
@pytest.mark.parametrize("stages", [0, 1])
def test_keys_and_values_are_asked_for_together(stages):
    """No row of a position is waited for before the other is in flight."""
    backend = TritonBackend()
    kernels = backend.ahead(DECODE, {**backend.default(DECODE), "stages": stages}, 90)
    (attend,) = {kernel for kernel in kernels if kernel.fn.__name__ == "_hash_attend_kernel"}
    assert stages == attend.constants.STAGES
    ptx = attend.compile(90).asm["ptx"]
    before, _, after = ptx.partition("griddepcontrol.wait")[2].partition("mma.sync")
    assert "ld.global.v4" not in after
    steps = re.findall(r"ld\.global\.v4|st\.shared\.v4", before)
    assert [name for name, _ in itertools.groupby(steps)] == ["ld.global.v4", "st.shared.v4"]
    # Values go to shared memory when the product with the keys has been taken, not before.
    assert steps.count("ld.global.v4") == 2 * steps.count("st.shared.v4") > 0


def test_a_share_of_several_tiles_has_a_loop():
    config = {"attend_splits": 4, "keys": 64, "stages": 0}
    assert splits_of(config, 1) == (1, 0)
    assert splits_of(config, 129) == splits_of(config, 256) == (4, 0)
    # `dense_below` beyond the budget: all keys of a row, in as many shares.
    assert splits_of(config, 257) == splits_of(config, 4096) == (4, 1)
    assert splits_of({**config, "stages": 2}, 256) == (4, 2)


def kernels_of(problem, sm):
    backend = TritonBackend()
    return backend.ahead(problem, backend.default(problem), sm)


def steps_of(name, pattern):
    """What a kernel of a decode step does after it has waited for the launch before, in PTX."""
    kernels = kernels_of(DECODE, 90)
    (kernel,) = {kernel for kernel in kernels if kernel.fn.__name__ == name}
    ptx = kernel.compile(90).asm["ptx"]
    return re.findall(pattern, ptx.partition("griddepcontrol.wait")[2])


def test_a_histogram_comes_in_vectors():
    """So do the first keys, which are asked for before the threshold is known."""
    steps = steps_of("_select_kernel", r"ld\.global\.\S+|bar\.warp\.sync")
    histogram, *keys = steps[: steps.index("bar.warp.sync")]
    assert histogram.startswith("ld.global.v")
    assert set(keys) == {"ld.global.v4.b32"}


@pytest.mark.parametrize(("batch", "asked_for"), [(1, True), (64, False)])
def test_selected_keys_are_asked_for_where_the_cache_holds_them(batch, asked_for):
    problem = replace(DECODE, batch=batch)
    kernels = kernels_of(problem, 90)
    (kernel,) = {kernel for kernel in kernels if kernel.fn.__name__ == "_select_kernel"}
    ptx = kernel.compile(90).asm["ptx"]
    assert ("prefetch.global.L2" in ptx) == asked_for


@pytest.mark.parametrize("name", ["_scan_kernel", "_select_kernel", "_hash_attend_kernel"])
def test_little_is_computed_between_a_wait_and_what_it_is_for(name):
    """A launch that waits has time; what stands behind its wait is in everybody's way."""
    steps = steps_of(name, r"(?m)^\s+(?:@%p\d+ )?([a-z]\w*(?:\.\w+)*)")
    assert "ld.global" in ".".join(steps[:40])


def test_all_that_is_merged_is_asked_for_at_once():
    steps = steps_of("_merge_kernel", r"@\S+ ld\.global|ld\.global|\bbra\b")
    loads = [step for step in steps if step != "bra"]
    assert steps[: len(loads)] == ["ld.global"] * len(loads)
    assert len(loads) > 2


def test_lists_of_kernels_agree():
    """What is listed for a target is the same, each once, whenever it is asked for."""
    first = {}
    for _ in range(2):
        for problem in (DECODE, ENCODE, NORMS, SPARSE):
            # One after the other, so that what is remembered of one would be seen in the next.
            for sm in (80, 90, 100, 120):
                kernels = kernels_of(problem, sm)
                assert kernels == first.setdefault((problem, sm), kernels)
                assert len(kernels) == len(set(kernels))
    assert len({tuple(first[DECODE, sm]) for sm in (80, 90, 100, 120)}) == 4
