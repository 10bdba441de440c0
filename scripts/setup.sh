# Sourced by the other scripts: makes .venv with the pinned packages, once, and activates it.
#     PYTHON=python3.12       the interpreter to make it with (at least 3.11)
#     VENV=/path/to/venv      another place for it
#     EXTRAS=dev              extras of pyproject.toml to install too
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"
EXTRAS="${EXTRAS:-}"

fail() {
    echo "error: $*" >&2
    exit 1
}

if [[ ! -x "$VENV/bin/python" ]]; then
    PYTHON="${PYTHON:-python3}"
    command -v "$PYTHON" > /dev/null || fail "$PYTHON is not there: install Python 3.11 or newer, or set PYTHON"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$PYTHON" --version) is too old: Python 3.11 or newer is needed; set PYTHON to one"
    echo "Making a virtual environment in $VENV"
    if ! "$PYTHON" -m venv "$VENV"; then
        rm -rf "$VENV"  # half made, it would be taken for whole the next time
        fail "python -m venv failed (on Debian and Ubuntu: apt install python3-venv)"
    fi
fi
command -v c++ > /dev/null || command -v g++ > /dev/null ||
    fail "no C++ compiler: DeepSpeed builds a small operator (on Debian and Ubuntu: apt install g++)"

# DeepSpeed's operators are built here, apart from other projects' builds
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.torch_extensions}"

# one stamp for each set of packages, named by the content of the files that decide what is installed
stamp="$VENV/.installed-$(cat requirements.txt constraints.txt pyproject.toml - <<< "$EXTRAS" | cksum | cut -d ' ' -f 1)"
if [[ ! -e "$stamp" ]]; then
    echo "Installing the project and its packages into $VENV (some minutes, once)"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e ".${EXTRAS:+[$EXTRAS]}" -c constraints.txt ||
        fail "pip could not install the packages"
    touch "$stamp"
fi
# shellcheck disable=SC1091
source "$VENV/bin/activate"

# Without a GPU, DeepSpeed builds an operator for communication between processes at first use. Built
# here, no run has to wait for it. A lock older than 10 minutes is what a killed build left behind.
if [[ -z "$(find "$TORCH_EXTENSIONS_DIR" -name 'deepspeed_shm_comm*.so' 2> /dev/null)" ]] &&
    python -c 'import sys, torch; sys.exit(torch.cuda.is_available())'; then
    echo "Building DeepSpeed's operator for CPUs (about a minute, once)"
    find "$TORCH_EXTENSIONS_DIR" -name lock -mmin +10 -delete 2> /dev/null || true
    DS_ACCELERATOR=cpu python -c '
from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)' > /dev/null ||
        fail "the operator could not be built: see the compiler's messages above"
fi
