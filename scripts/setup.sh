# Sourced by other scripts: creates a virtual environment with the pinned packages, once, and activates it.
#     PYTHON    interpreter to create it with, 3.11 or newer; default python3
#     VENV      directory of the environment; default .venv
#     EXTRAS    extras of pyproject.toml to install as well, such as dev
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"
EXTRAS="${EXTRAS:-}"

fail() {
    echo "error: $*" >&2
    exit 1
}

if [[ ! -x "$VENV/bin/python" ]]; then
    PYTHON="${PYTHON:-python3}"
    command -v "$PYTHON" > /dev/null || fail "$PYTHON was not found: install Python 3.11 or newer, or set PYTHON"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$PYTHON" --version) is too old: Python 3.11 or newer is needed; set PYTHON to one"
    echo "Creating a virtual environment in $VENV"
    if ! "$PYTHON" -m venv "$VENV"; then
        rm -rf "$VENV"  # the next call would take an incomplete environment for a complete one
        fail "python -m venv failed (on Debian and Ubuntu: apt install python3-venv)"
    fi
fi
command -v c++ > /dev/null || command -v g++ > /dev/null ||
    fail "no C++ compiler: DeepSpeed builds a small operator (on Debian and Ubuntu: apt install g++)"
[[ -f "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]] ||
    fail "Python's headers are missing: DeepSpeed builds a small operator (on Debian and Ubuntu: apt install python3-dev)"

# DeepSpeed's operators are built in the project, apart from those of other projects
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.torch_extensions}"

# A file marks the environment as complete. Its name is a checksum of the files that decide what is installed, so that
# a change of theirs installs again.
stamp="$VENV/.installed-$(cat requirements.txt constraints.txt pyproject.toml - <<< "$EXTRAS" | cksum | cut -d ' ' -f 1)"
if [[ ! -e "$stamp" ]]; then
    echo "Installing the project and its packages into $VENV (a few minutes, once)"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e ".${EXTRAS:+[$EXTRAS]}" -c constraints.txt ||
        fail "pip could not install the packages"
    touch "$stamp"
fi
# shellcheck disable=SC1091
source "$VENV/bin/activate"

# Without a GPU, DeepSpeed builds an operator for communication between processes at its first use. It is built here, so
# that no run has to wait for it.
if [[ -z "$(find "$TORCH_EXTENSIONS_DIR" -name 'deepspeed_shm_comm*.so' 2> /dev/null)" ]] &&
    python -c 'import sys, torch; sys.exit(torch.cuda.is_available())'; then
    DS_ACCELERATOR=cpu python -m dft.operators ||
        fail "the operator could not be built: see the compiler's messages above"
fi
