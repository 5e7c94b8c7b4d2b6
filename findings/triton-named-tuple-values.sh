#!/usr/bin/env bash
# Triton 3.7.1 (also 3.6.0), a kernel that takes a named tuple with a field called `values`: the field
# cannot be read by its name. Inside a kernel a tuple is the compiler's own, which has an attribute
# `values`, the list of all its fields, and Python finds that first. Where the field is a tuple itself
# nothing is said: `pair.values[0]` is the first field of `pair`. The interpreter (TRITON_INTERPRET=1)
# keeps the named tuple and reads the field, so the same kernel copies another number there.
#
# Seen: PTX for sm_90 loads from the pointer that is the first field (kernel_param_0), not from the one
# in `values` (kernel_param_2), as it does when the field is called `vals`; the interpreter copies 7.0,
# which is in `values`, where the first field holds 1.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$work/env/bin/python" -m pip install --quiet --disable-pip-version-check triton==3.7.1 numpy==2.4.6
cat >"$work/program.py" <<'PY'
import os
import re
from collections import namedtuple

import triton
import triton.language as tl

ByValues = namedtuple("ByValues", "first out values")
ByVals = namedtuple("ByVals", "first out vals")


@triton.jit
def by_values(pair):
    tl.store(pair.out, tl.load(pair.values[0]))


@triton.jit
def by_vals(pair):
    tl.store(pair.out, tl.load(pair.vals[0]))


if os.environ.get("TRITON_INTERPRET") == "1":
    import torch

    out = torch.zeros(1)
    by_values[(1,)](ByValues(torch.ones(1), out, (torch.full((1,), 7.0),)))
    print("interpreted, `values`: copies", out.item())
    assert out.item() == 7.0
else:
    from triton.backends.compiler import GPUTarget

    print("triton", triton.__version__)
    for kernel, kind, expected in ((by_values, ByValues, "0"), (by_vals, ByVals, "2")):
        signature = {"pair": kind("*fp32", "*fp32", ("*fp32",))}
        source = triton.compiler.ASTSource(kernel, signature, {})
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        register = re.search(r"ld\.global\S* *\{? *%r\d+ *\}?, *\[ *(%rd\d+)", ptx)[1]
        (found,) = re.findall(rf"ld\.param\S*\s+{register}, \[\w+_param_(\d)\]", ptx)
        print(f"compiled, `{kind._fields[2]}`: loads from parameter {found}")
        assert found == expected
PY
export TRITON_CACHE_DIR="$work/cache"
"$work/env/bin/python" "$work/program.py"
TRITON_INTERPRET=1 "$work/env/bin/python" "$work/program.py"
echo "as described"
