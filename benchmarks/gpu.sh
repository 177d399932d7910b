#!/bin/bash
# All benchmarks on a GPU, one after the other: bash benchmarks/gpu.sh. README.md beside it says how to read them.
# JSON and what is printed go to benchmarks/gpu/. From the environment, all optional:
#   PYTHON     the interpreter (.venv/bin/python)
#   CLASSES    classes at once (the preset's hardware.classes_per_pass)
#   CARDS      memory limits in 10^9 bytes to try (23 47 79 140: cards of 24, 48, 80 and 141 GB, less 1)
#   LONG       steps of the long run (2000)
#   IMAGES     folder with train/<class>/* (synthetic images)
#   VAE        folder or hub id (that of the ablation preset)
#   GENERATOR, PARAMS    a generator and its settings for fid (artifacts/generator, params.yaml)
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=benchmarks/gpu
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

for limit in ${CARDS:-23 47 79 140}; do
    for classes in 64 32 16 8 4 2 1; do
        bench "memory-$limit-$classes" step --memory-limit "$limit" --steps 3 --set hardware.classes_per_pass=$classes
    done
done
at_once=${CLASSES:+--set hardware.classes_per_pass=$CLASSES}
bench step step $at_once --steps 30
bench long step $at_once --steps "${LONG:-2000}"
bench mae step --stage mae
bench field field --device cuda
for how in "float32 false" "bfloat16 false" "bfloat16 true"; do
    read -r precision compile <<<"$how"
    bench "encode-$precision-compile-$compile" encode --count 2048 ${IMAGES:+--images "$IMAGES"} --set \
        "encode.precision=$precision" "hardware.compile=$compile" hardware.encode_batch=128 ${VAE:+"encode.autoencoder=$VAE"}
done
bench fid fid --images 2000 20000 --generator "${GENERATOR:-artifacts/generator}" \
    --preset "${PARAMS:-params.yaml}" --set 'fid.omegas=[1]'

echo "figures in $OUT/"
if [ "${#failed[@]}" -gt 0 ]; then
    echo "failed: ${failed[*]} (see $OUT/NAME.err)"
    exit 1
fi
