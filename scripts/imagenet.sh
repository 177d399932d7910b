#!/usr/bin/env bash
# An ImageNet preset from a bare machine with NVIDIA GPUs to its metrics: bash scripts/imagenet.sh [OPTIONS]
# It says what it needs and costs, asks, then installs, fetches what is missing, runs the pipeline and shares the result.
#   --preset NAME        of presets/ (imagenet256_ablation)
#   --images DIR         ImageNet as DIR/train/<class>/*.JPEG and DIR/val/<class>/*.JPEG (data/imagenet)
#   --tflops N           what a GPU is assumed to do (400)
#   --price N            of a GPU hour, in any currency
#   --push OWNER/NAME    upload the generator to the Hugging Face hub, private, after `hf auth login`
#   --yes                do not ask
#   --dry-run            show the plan and the commands, and run none of them
# The same command goes on after a stop. Ctrl-C, SIGTERM and a lost connection let the stage save its step first.
# Everything shown is also in imagenet.log. params.yaml may be changed between two runs of a preset.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

preset=imagenet256_ablation images=data/imagenet tflops=400 price='' push='' yes='' dry=''
fail() { echo "error: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
        --preset | --images | --tflops | --price | --push)
            [ -n "${2:-}" ] || fail "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift ;;
        --yes) yes=1 ;;
        --dry-run) dry=1 ;;
        -h | --help) sed -n '2,/^set/{/^# \{0,1\}/!d; s///; p}' scripts/imagenet.sh; exit ;;
        *) fail "$1: there is no such option; --help shows all" ;;
    esac
    shift
done

# What the machine has, and what the run needs. A problem ends it; a dry run only shows it.
problem() { if [ -n "$dry" ]; then echo "problem    $*"; else fail "$*"; fi; }
python=''
for name in python3 python3.13 python3.12 python3.11; do
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        python=$(command -v "$name")
        break
    fi
done
[ -n "$python" ] || fail "no Python 3.11 to 3.13 is installed (apt install python3 python3-venv, or uv python install 3.13)"
needs=$("$python" scripts/plan.py "$preset" --needs) || exit 2
read -r disk gpu_memory memory gpus <<<"$needs"
grep -q '^  root: data/imagenet' "presets/$preset.yaml" || fail "--preset $preset: is not one of ImageNet"
sizes=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null) || sizes=''
[ -z "$sizes" ] || gpus=$(wc -l <<<"$sizes")
"$python" scripts/plan.py "$preset" --gpus "$gpus" --tflops "$tflops" ${price:+--price "$price"} || exit 2

[ -n "$sizes" ] || problem "no NVIDIA GPU: nvidia-smi is missing or finds none; rent a machine with one, driver installed"
for size in $sizes; do
    # A card of 80 GB has 79 to 82 thousand MiB
    [ $((size * 1024 * 1024)) -ge $((gpu_memory * 950000000)) ] || {
        echo "warning    a GPU has $size MiB, not $gpu_memory GB: lower hardware.classes_per_pass if memory runs out"
        break
    }
done
there=$(awk '/^MemTotal/ {print int($2 * 1024 / 1e9)}' /proc/meminfo)
[ "$there" -ge "$memory" ] || echo "warning    $there GB of memory, not $memory: latents will be read from the disk again and again"
used=$(du -sc --block-size=1GB .venv .work .dvc/cache artifacts 2>/dev/null | awk 'END {print $1}') || true
free=$(df --output=avail --block-size=1GB . | tail -1)
[ $((free + used)) -ge "$disk" ] || problem "$((free)) GB of disk are free and $used GB used by runs, of $disk GB: get more"
for program in git make; do
    command -v "$program" >/dev/null || problem "$program is not installed (apt install $program)"
done
for split in train val; do
    [ -n "$(find -L "$images/$split" -mindepth 2 -maxdepth 2 -print -quit 2>/dev/null)" ] || {
        problem "no images in $images/$split/<class>/: image-net.org gives ILSVRC 2012 to those with an account;" \
            "unpack it and name it by --images DIR"
        break
    }
done

if [ -z "$yes$dry" ]; then
    [ -t 0 ] || fail "nobody can be asked here: give --yes to start"
    read -rp 'Start? [y/N] ' answer
    [ "$answer" = y ] || exit 1
fi

# Every command runs in a process group of its own, to which signals are passed as Ctrl-C: of SIGTERM, DVC would die and
# leave its stage behind.
[ -n "$dry" ] || exec > >(trap '' INT TERM HUP; exec tee -a imagenet.log) 2>&1
set -m
child='' stopped=''
stop() { stopped=$1; [ -z "$child" ] || kill -INT -- "-$child" 2>/dev/null || true; }
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP
attempt() {  # COMMAND...: run it; its exit code
    printf '+'; printf ' %q' "$@"; echo
    [ -z "$dry" ] || return 0
    local code=0
    "$@" &
    child=$!
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do code=0; wait "$child" || code=$?; done
    child=''
    [ -z "$stopped" ] || { echo "stopped: the same command goes on"; exit "$stopped"; }
    return "$code"
}
run() { attempt "$@" || { echo "error: exit code $? of: $*; the same command goes on from there" >&2; exit 1; }; }
try() { attempt "$@" || echo "without that: exit code $? of: $*"; }

export PATH=$PWD/.venv/bin:$PATH
run make setup git PYTHON="$python"
if [ "$(realpath -m "$images")" != "$(realpath -m data/imagenet)" ]; then
    run mkdir -p data
    run ln -sfnT "$(realpath -m "$images")" data/imagenet
fi
if [ "$(head -1 params.yaml)" != "$(head -1 "presets/$preset.yaml")" ]; then
    run cp --backup=numbered "presets/$preset.yaml" params.yaml
fi
run dvc config --local cache.type reflink,hardlink,symlink,copy # latents are not stored twice

# The default remote, or the rclone remote that .dvc/config names, if this machine has it
storage=()
if [ -n "$(dvc config core.remote 2>/dev/null)" ]; then
    storage=(dvc)
elif name=$(sed -n 's|.*remote://drift-remote/\([^/]*\)/.*|\1|p' .dvc/config 2>/dev/null | head -1) &&
    [ -n "$name" ] && rclone listremotes 2>/dev/null | grep -qxF "$name:"; then
    storage=(drift remote -- dvc)
fi
[ ${#storage[@]} -gt 0 ] || echo "no storage is set up (docs/sharing.md): nothing is pulled or pushed"
[ ${#storage[@]} -eq 0 ] || try "${storage[@]}" pull --allow-missing

fetch='from drift.settings import load_settings as load; s = load("params.yaml"); vae = s.encode.autoencoder.load(); '
fetch+='[one.load(autoencoder=vae) for one in s.features if not one.needs_mae]'
run python -c "$fetch"
run drift fid-selftest # fetches Inception, and measures the reference, which the stage fid uses again
run dvc repro
[ ${#storage[@]} -eq 0 ] || run "${storage[@]}" push
[ -z "$push" ] || run drift export "outputs/$preset" --force --vae-by-reference --push "$push"
[ -n "$dry" ] || python -m drift.evaluation.report
