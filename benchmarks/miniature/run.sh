#!/usr/bin/env bash
# The study in miniature; options are those of benchmarks/miniature/__main__.py. Goes on where it was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 exec "${PYTHON:-python}" -m benchmarks.miniature "$@"
