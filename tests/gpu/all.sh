#!/usr/bin/env bash
# All that a GPU is needed for, from the root of a checkout: what is right side by side, then what is
# timed, alone. Logs and figures go to a folder; a line a step says how it went.
#
#     tests/gpu/all.sh FOLDER
set -u
out=${1:?"usage: tests/gpu/all.sh FOLDER"}
mkdir -p "$out"
failed=0

step() { # name, command...
    local name=$1 start=$SECONDS status
    shift
    "$@" >"$out/$name.log" 2>&1
    status=$?
    echo "$name: $([ $status -eq 0 ] && echo passed || echo "FAILED ($status), see $out/$name.log")," \
        "$((SECONDS - start)) s"
    return $status
}

watched() { # Once by itself first, so that kernels are compiled.
    local status=0 tool
    step sanitize python3 tests/gpu/sanitize.py || return 1
    for tool in memcheck racecheck; do
        step $tool compute-sanitizer --tool $tool --error-exitcode 9 python3 tests/gpu/sanitize.py ||
            status=1
    done
    return $status
}

spoken() {
    local status=0 backend
    [ -n "${HATA_TEST_MODEL:-}" ] || { echo "generate: left out, HATA_TEST_MODEL is not set"; return 0; }
    for backend in triton cupy; do
        step generate-$backend python3 examples/generate.py --device cuda --backend $backend \
            --model "$HATA_TEST_MODEL" --needle 4096 --n 40 || status=1
    done
    return $status
}

jobs=()
step suite python3 tests/gpu/run.py --shared & jobs+=($!)
watched & jobs+=($!)
spoken & jobs+=($!)
for job in "${jobs[@]}"; do wait "$job" || failed=1; done

step clocks python3 tests/gpu/run.py --alone || failed=1
for backend in triton cupy; do
    step design-$backend python3 -m benchmarks.ops --backend $backend --device cuda --suite design \
        --rounds 7 --json "$out/design-$backend.json" || failed=1
done
step tune python3 -m tune --gpu auto --quick --out "$out/profile.yaml" || failed=1
exit $failed
