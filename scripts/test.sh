#!/usr/bin/env bash
# Install what the tests need and run them: bash scripts/test.sh [arguments of pytest]
#     bash scripts/test.sh -m "not launch"    # without the tests that start training processes
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
EXTRAS=dev source "$here/setup.sh"
# in three processes, because much of the time is spent waiting for programs to start; the tests of a file stay together,
# because they share fixtures
exec python -m pytest -n 3 --dist loadfile "$@"
