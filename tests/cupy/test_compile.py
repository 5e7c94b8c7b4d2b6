"""Every kernel compiles for every architecture, without a GPU; what it takes is recorded."""

import importlib
import struct

import pytest

from hata.problem import Problem

pytest.importorskip("cupy", reason="the CuPy backend needs it")

LLAMA = {
    "device": "cuda", "heads": 32, "kv_heads": 8, "head_dim": 128, "bits": 128, "k": 2048,
    "slots": 131072,
}  # fmt: skip


def attention(dtype, projection_dtype=None, **sizes):
    """A decode step; `sizes` differ from those of Llama 3.1 8B."""
    sizes = {**LLAMA, "value_dim": 128, **sizes}
    return Problem("hash_attend", dtype=dtype, projection_dtype=projection_dtype or dtype, **sizes)


PROBLEMS = {
    "decode": attention("bfloat16"),
    "large-batch": attention("float16", batch=8, heads=64),
    "many-keys": attention("bfloat16", batch=32, k=32768, slots=65536),
    "long-codes": attention("bfloat16", heads=32, kv_heads=2, bits=256),
    "mla": attention(
        "bfloat16", heads=16, kv_heads=1, head_dim=576, value_dim=512, bits=256, batch=4
    ),
    "odd": attention(
        "float16", "float32", heads=7, kv_heads=1, head_dim=80, value_dim=96, bits=96, aligned=False
    ),
    "float32": attention(
        "float32", heads=16, kv_heads=2, head_dim=64, value_dim=64, tokens=2, norms=True
    ),
    "encode": Problem(
        "encode", "cuda", "bfloat16", "bfloat16", heads=8, kv_heads=8, head_dim=128, bits=128,
        tokens=131072, norms=True,
    ),
    "norms": Problem(
        "hamming_topk", "cuda", "uint8", heads=32, kv_heads=8, bits=128, k=2048, slots=131072,
        norms=True,
    ),
    "per-head": Problem(
        "sparse_attend", "cuda", "float16", heads=32, kv_heads=8, head_dim=64, value_dim=64, k=512,
        slots=32768, per_head=True,
    ),
}  # fmt: skip
# Every architecture, and every problem.
CASES = [
    *(("decode", architecture) for architecture in (80, 90, 100, 120)),
    ("large-batch", 90), ("many-keys", 80), ("many-keys", 90), ("long-codes", 90), ("mla", 100),
    ("odd", 120), ("float32", 80), ("encode", 80),
    ("encode", 100), ("norms", 90), ("per-head", 120),
]  # fmt: skip
# Bytes of stack that a thread may take: a spill in a hot loop is slow.
MOST_STACK = 640
# EIATTR numbers of a cubin's .nv.info: what the driver is told of a kernel.
REGISTERS, FRAME = 0x2F, 0x11


@pytest.fixture(scope="module", autouse=True)
def _fresh_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HATA_CACHE", str(tmp_path_factory.mktemp("cubins")))
        yield


def resources(code):
    """Registers and stack bytes of a cubin that holds one kernel."""
    start, size, count, names = struct.unpack_from("<Q10xHHH", code, 0x28)
    sections = [struct.unpack_from("<IIQQQQ", code, start + i * size) for i in range(count)]
    base = sections[names][4]
    found = {}
    for name, _, _, _, offset, length in sections:
        if code[base + name :].split(b"\0", 1)[0] != b".nv.info":
            continue
        at = offset
        while at < offset + length:
            form, kind, value = struct.unpack_from("<BBH", code, at)
            if form == 4:
                # Entries of a kernel: its symbol, and a number.
                if kind in (REGISTERS, FRAME):
                    found[kind] = struct.unpack_from("<I", code, at + 8)[0]
                at += value
            at += 4
    return {"registers": found[REGISTERS], "stack": found.get(FRAME, 0)}


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_kernels_compile(name, architecture, record_property):
    backend = importlib.import_module("hata.backends.cupy").CuPyBackend()
    compiler = importlib.import_module("hata.backends.cupy.compiler")
    problem = PROBLEMS[name]
    found = backend.ahead(problem, backend.default(problem), architecture)
    assert found
    if name == "decode":
        # Through global memory; with all that is not the default.
        for changes in ({"cluster": "cooperative"}, {"binary_mma": False, "fused": False}):
            config = {**backend.default(problem), "num_splits": 8, **changes}
            found += backend.ahead(problem, config, architecture)
        found = list(dict.fromkeys(found))
        assert {kernel.name for kernel in found} >= {"encode", "hash_attend"}
    if name == "many-keys":
        # Too many positions for shared memory.
        assert {dict(kernel.constants).get("POSITIONS_AT", 0) for kernel in found} == {0}
    for kernel in found:
        code = compiler.cubin(kernel.name, kernel.constants, architecture)
        taken = resources(code)
        record_property(kernel.name, taken)
        blocks = dict(kernel.constants).get("BLOCKS_PER_SM", 1)
        assert taken["registers"] * kernel.threads * blocks <= 65536
        assert taken["stack"] <= MOST_STACK, kernel
