#!/usr/bin/env bash
# Sets up what is needed and runs the tests: bash scripts/test.sh [pytest's arguments]
#     bash scripts/test.sh -m "not launch"    # without those that start training processes: seconds
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
EXTRAS=dev source "$here/setup.sh"
# two at a time, those of a file together: most of the time goes into starting programs
exec python -m pytest -n 2 --dist loadfile "$@"
