#!/usr/bin/env bash
# Pack the project and the wheels that a machine without a network lacks, for benchmarks/gpu/run.sh:
#     bash benchmarks/gpu/pack.sh dft-gpu.tar [--limit 60] [--without "pyarrow"]
# On that machine:
#     tar xf dft-gpu.tar && bash dft-gpu/benchmarks/gpu/run.sh OUT
#
# The wheels are for Python 3.12 on x86-64 Linux, in the tested versions. The machine is expected to have torch, triton,
# numpy, pandas, matplotlib, pytest, hypothesis and a C++ compiler. What doesn't fit into the limit, in MiB, is left out
# and listed in the archive's LEFT_OUT. Only what is committed is packed. It takes about 8 minutes, most of it for xz.
#     PYTHON    an interpreter with pip, torch and setuptools, which builds DeepSpeed's wheel; default python
set -euo pipefail
fail() {
    echo "error: $*" >&2
    exit 2
}
[[ $# -gt 0 && "$1" != -* ]] || fail "usage: bash benchmarks/gpu/pack.sh FILE.tar [--limit 60] [--without \"…\"]"
archive="$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"
shift
limit=60 without=""
while [[ $# -gt 0 ]]; do
    case "$1" in
        --limit) limit="${2:?}" && shift ;;
        --without) without="${2:?}" && shift ;;
        *) fail "unknown argument $1" ;;
    esac
    shift
done
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-python}"

# In the order of their worth. The packages of a line need each other and are packed together or not at all.
groups=(
    "transformers tokenizers regex safetensors"
    "datasets dill multiprocess xxhash"
    "deepspeed hjson pydantic pydantic_core annotated-types typing-inspection typing_extensions einops py-cpuinfo msgpack"
    "accelerate peft psutil"
    "trl" "liger-kernel" "cut-cross-entropy"
    "pyarrow"
    # Liger's kernel for Hopper GPUs
    "nvidia-cutlass-dsl==4.8.1 nvidia-cutlass-dsl-libs-base==4.8.1 nvidia-cutlass-dsl-libs-core==4.8.1
     nvidia-cutlass-dsl-libs-cu13==4.8.1 apache-tvm-ffi==0.1.15.post2"
)
tags=(--python-version 3.12 --implementation cp)
for tag in manylinux1 manylinux2014 manylinux_2_17 manylinux_2_24 manylinux_2_27 manylinux_2_28; do
    tags+=(--platform "${tag}_x86_64")
done

# A package with its tested version, unless it comes with one.
pinned() {
    if [[ "$1" == *==* ]]; then echo "$1"; return; fi
    grep -ohE "^$1==[^ ]+|(\")$1==[^\"]+" constraints.txt pyproject.toml | tr -d '"' | head -n 1 | grep . ||
        fail "$1 is pinned neither in constraints.txt nor in pyproject.toml"
}

# Gets the wheel of a package into a directory. DeepSpeed has none: it is built here, without its operators.
get() {
    if [[ "$1" == deepspeed==* ]]; then
        DS_BUILD_OPS=0 "$python" -m pip wheel -q --no-deps --no-build-isolation --wheel-dir "$2" "$1"
    else
        "$python" -m pip download -q --no-deps --only-binary=:all: "${tags[@]}" --dest "$2" "$1"
    fi
}

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
tree="$work/dft-gpu"
mkdir -p "$tree/benchmarks/gpu/wheels"
git archive HEAD | tar xf - -C "$tree"
[[ -f "$tree/benchmarks/gpu/run.sh" ]] || fail "benchmarks/gpu/run.sh is not committed"
git rev-parse --short HEAD > "$tree/benchmarks/gpu/COMMIT"

used="$(du --apparent-size -sk "$tree" | cut -f 1)"  # KiB
for group in "${groups[@]}"; do
    got="$work/got" && rm -rf "$got" && mkdir "$got"
    for package in $group; do
        name="${package%%==*}"
        if [[ " $without " == *" $name "* ]]; then echo "$name: left out as asked" | tee -a "$tree/LEFT_OUT"; continue; fi
        get "$(pinned "$package")" "$got" 2> "$work/pip.log" || { cat "$work/pip.log" >&2; fail "$package can't be had"; }
    done
    for wheel in "$got"/*.whl; do
        if [[ -f "$wheel" ]]; then
            "$python" -m benchmarks.gpu.wheels squeeze "$wheel" "$wheel.xz"
            rm "$wheel"
        fi
    done
    size="$(du --apparent-size -sk "$got" | cut -f 1)"
    if (( used + size > limit * 1024 - 1024 )); then
        echo "$(tr -s ' \n' ' ' <<< "$group"): left out for size, $(( size / 1024 )) MiB" | tee -a "$tree/LEFT_OUT"
    else
        used=$(( used + size ))
        mv "$got"/* "$tree/benchmarks/gpu/wheels/" 2> /dev/null || true
    fi
done
tar cf "$archive" -C "$work" dft-gpu
ls "$tree/benchmarks/gpu/wheels"
echo "$archive: $(( $(stat -c %s "$archive") / 1024 )) KiB of at most $limit MiB"
