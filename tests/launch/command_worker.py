"""Runs programs of the project, each in a child that shares the imports of this process, which take seconds.

    echo '{"help": ["scripts/chat.py", "--help"]}' | python tests/launch/command_worker.py OUT

Reads {name: command line} and writes OUT/NAME.json, {"status": exit status, "output": stdout and stderr together}.
"""

import importlib
import json
import os
import pkgutil
import runpy
import sys
import tempfile
import traceback
from pathlib import Path

import dft
import dft_trainer  # noqa: F401


def import_package() -> None:
    """Imports all modules, and with them the libraries; none may start a thread, which a fork would lose."""
    for module in pkgutil.walk_packages(dft.__path__, "dft."):
        importlib.import_module(module.name)


def run_program(command: list[str]) -> int:
    """Runs a script as the interpreter would, and returns its exit status, unless it ends the process itself."""
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # which the interpreter would print, too, and end with 1
        traceback.print_exc()
        return 1
    return 0


def run_child(command: list[str]) -> dict[str, int | str]:
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            status = run_program(command)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output.seek(0)
        return {"status": status, "output": output.read().decode()}


def main() -> None:
    commands, out = json.load(sys.stdin), Path(sys.argv[1])
    import_package()
    for name, command in commands.items():
        result = run_child(command)
        (out / f"{name}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
