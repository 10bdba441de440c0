#!/usr/bin/env bash
# Measure and test the project on one CUDA machine, without a network:
#     bash benchmarks/gpu/run.sh OUT [--minutes 8] [--tiny] [--parts "facts step"]
#
# OUT gets a result and a log for each part, and results.md. The last line printed is JSON. The exit status is 1 if a
# part failed; a part that can't run here is skipped, and says why.
#     --minutes    for all parts together; each gets its share, and what earlier ones left
#     --tiny       sizes of a test, which run on the processor
#     --parts      some of: facts correctness loss_head step memory quickstart
#     PYTHON       an interpreter with torch; default: python, .venv/bin/python or python3, the first one that has it
#     WHEELS       a directory of wheels to put before what is installed; default: wheels beside this file, if it is there
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"

fail() {
    echo "error: $*" >&2
    exit 2
}
[[ $# -gt 0 && "$1" != -* ]] || fail "usage: bash benchmarks/gpu/run.sh OUT [--minutes 8] [--tiny] [--parts \"…\"]"
mkdir -p "$1"
out="$(cd "$1" && pwd)"
shift
minutes=8 parts="facts correctness loss_head step memory quickstart" options=()
while [[ $# -gt 0 ]]; do
    case "$1" in
        --minutes) minutes="${2:?}" && shift ;;
        --parts) parts="${2:?}" && shift ;;
        --tiny) options=(--tiny) && export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" ;;
        *) fail "unknown argument $1" ;;
    esac
    shift
done
declare -A share=([facts]=8 [correctness]=40 [loss_head]=30 [step]=30 [memory]=15 [quickstart]=20)
for part in $parts; do [[ -n "${share[$part]:-}" ]] || fail "no part is named $part"; done

cd "$root"
for candidate in "${PYTHON:-python}" .venv/bin/python python3; do
    path="$(command -v "$candidate" || true)"
    if [[ -n "$path" ]] && "$path" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))'; then break; fi
    path=""
done
[[ -n "$path" ]] || fail "no Python with torch was found: set PYTHON to one"
python="$(cd "$(dirname "$path")" && pwd)/$(basename "$path")"
deadline="$(awk "BEGIN { print $SECONDS + int($minutes * 60) }")"

# Wheels go where they disturb nothing. The directory is called site-packages because dill, with which datasets makes
# its fingerprints, takes packages elsewhere for the user's own code. A wheel that doesn't fit the interpreter is left out.
wheels="${WHEELS:-$here/wheels}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [[ -d "$wheels" ]]; then
    "$python" -m benchmarks.gpu.wheels expand "$wheels" "$out/wheels"
    install=("$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --upgrade)
    if ! "${install[@]}" --target "$out/site-packages" "$out"/wheels/*.whl > "$out/install.log" 2>&1; then
        for wheel in "$out"/wheels/*.whl; do
            "${install[@]}" --target "$out/site-packages" "$wheel" >> "$out/install.log" 2>&1 ||
                echo "Not installed: $(basename "$wheel"), see install.log"
        done
    fi
    rm -r "$out/wheels"
    export PYTHONPATH="$out/site-packages:$PYTHONPATH" PATH="$out/site-packages/bin:$PATH"
    echo "Installed wheels into $out/site-packages"
fi

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
shares=0
for part in $parts; do shares=$(( shares + share[$part] )); done
for part in $parts; do
    left=$(( deadline - SECONDS > 0 ? deadline - SECONDS : 0 ))
    limit=$(( left * share[$part] / shares > 0 ? left * share[$part] / shares : 1 ))
    shares=$(( shares - share[$part] ))
    rm -f "$out/$part.json" || true  # where that fails, so will the part, and the others go on
    echo "== $part, at most $limit s"
    began=$SECONDS status=0
    timeout --kill-after=15 "$limit" "$python" -m "benchmarks.gpu.$part" --out "$out" --seconds "$limit" "${options[@]}" \
        > "$out/$part.log" 2>&1 || status=$?
    echo "   ended with status $status after $(( SECONDS - began )) s"
done
# shellcheck disable=SC2086  # the parts are words
exec "$python" -m benchmarks.gpu.table --out "$out" --parts $parts
