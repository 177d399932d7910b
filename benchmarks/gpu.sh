#!/bin/bash
# All benchmarks on a GPU, one after the other: bash benchmarks/gpu.sh. README.md beside it says how to read them.
# JSON, what is printed and a trace go to benchmarks/gpu/. From the environment, all optional:
#   PYTHON     the interpreter (.venv/bin/python)
#   MINUTES    of the long run (20)
#   CLASSES    classes at once (the fastest that the table of memory has, on the whole card)
#   CARDS      limits for that table in 10^9 bytes (23 47 79 140: cards of 24, 48, 80 and 141 GB, less 1)
#   IMAGES     folder with train/<class>/* (synthetic images)
#   VAE        folder or hub id (that of the ablation preset)
#   GENERATOR, PARAMS    a generator and its settings for fid (artifacts/generator, params.yaml)
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=benchmarks/gpu
VAE=${VAE:-stabilityai/sd-vae-ft-mse}
TABLE="64 32 16 8 4 2 1"
failed=()
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "no CUDA device")' || exit 1
mkdir -p "$OUT"

bench() {  # NAME MODULE ARGUMENTS...
    local name=$1 module=$2
    shift 2
    echo "== $name: python -m benchmarks.$module $*"
    "$PYTHON" -m "benchmarks.$module" "$@" --json "$OUT/$name.json" 2>"$OUT/$name.err" | tee "$OUT/$name.txt"
    if [ "${PIPESTATUS[0]}" -ne 0 ]; then
        tail -n 3 "$OUT/$name.err"
        failed+=("$name")
    fi
}

bench memory step --classes-per-pass $TABLE
for limit in ${CARDS:-23 47 79 140}; do
    bench "memory-$limit" step --classes-per-pass $TABLE --memory-limit "$limit"
    bench "memory-$limit-saving" step --classes-per-pass $TABLE --memory-limit "$limit" \
        --feature-batch 64 --set hardware.activation_checkpointing=true
done

CLASSES=${CLASSES:-$("$PYTHON" - "$OUT/memory.json" <<'END'
import json, sys
rows = [row for row in json.load(open(sys.argv[1]))["memory_table"] if row["fits"]]
print(min(rows, key=lambda row: row["step_ms"])["classes_per_pass"])
END
)}
AT_ONCE=${CLASSES:+--classes-per-pass $CLASSES}
bench step step $AT_ONCE --steps 30 --trace "$OUT/trace.json"
bench step-triton step $AT_ONCE --steps 30 --set hardware.field_impl=triton
bench long step $AT_ONCE --minutes "${MINUTES:-20}"
bench mae step --stage mae
bench plain step $AT_ONCE --plain vectorised
bench plain-literal step $AT_ONCE --plain literal
bench field field --device cuda
bench field-triton field --device cuda --impl triton
bench encode encode --vae "$VAE" --count 2048 --batch 128 ${IMAGES:+--images "$IMAGES"}
for precision in float32 bfloat16; do
    bench "encode-$precision-compiled" encode --vae "$VAE" --count 2048 --batch 128 --compile \
        --vae-precision "$precision" ${IMAGES:+--images "$IMAGES"}
done
bench encode-bfloat16 encode --vae "$VAE" --count 2048 --batch 128 --vae-precision bfloat16 \
    ${IMAGES:+--images "$IMAGES"}
bench fid fid --images 2000 20000 --generator "${GENERATOR:-artifacts/generator}" --params "${PARAMS:-params.yaml}"

echo "figures in $OUT/"
if [ "${#failed[@]}" -gt 0 ]; then
    echo "failed: ${failed[*]} (see $OUT/NAME.err)"
    exit 1
fi
