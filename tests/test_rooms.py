"""The house keeps its order: who may import whom, and that imports do nothing."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

from tests.helpers import ROOT

TOP_LEVEL = ("train_dft", "dft_trainer", "data_utils", "dist_logger")
DATA_ROOMS = ("reading", "chat", "data")  # in the order of a row's way
TRAINING_ROOMS = ("batching", "loss", "metrics")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in [*ROOT.glob("*.py"), *(ROOT / "dft").rglob("*.py")]}


def imports_of(path: Path) -> set[str]:
    """The project's modules that a file imports, at its top and inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {name for name in names if name in MODULES}
    return found - {"dft"}


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def room_of(module: str) -> str:
    return module.split(".")[1] if module.count(".") > 1 else ""


def test_the_top_level_holds_the_four_files_that_are_promised():
    assert {path.stem for path in ROOT.glob("*.py")} == set(TOP_LEVEL)


def test_the_package_imports_no_file_of_the_top_level():
    for name, imported in IMPORTS.items():
        if name.startswith("dft."):
            assert not imported & set(TOP_LEVEL), name


def test_data_rooms_and_training_rooms_never_import_each_other():
    for name, imported in IMPORTS.items():
        rooms = {room_of(other) for other in imported}
        if room_of(name) in DATA_ROOMS:
            assert not rooms & set(TRAINING_ROOMS), name
        if room_of(name) in TRAINING_ROOMS:
            assert not rooms & set(DATA_ROOMS), name


def test_rooms_are_in_the_order_of_a_rows_way():
    """A room imports those before it, never those after it: reading, chat, data; and loss, metrics."""
    for order in (DATA_ROOMS, ("loss", "metrics")):
        for name, imported in IMPORTS.items():
            if room_of(name) in order:
                later = order[order.index(room_of(name)) + 1 :]
                assert not {room_of(other) for other in imported} & set(later), name


def test_only_programs_and_the_selection_itself_import_the_selection():
    """It is done before a training, which must not depend on it."""
    for name, imported in IMPORTS.items():
        if name not in TOP_LEVEL and room_of(name) != "selection":
            assert "selection" not in {room_of(other) for other in imported}, name


def test_no_module_and_no_room_imports_itself_through_others():
    list(TopologicalSorter(IMPORTS).static_order())  # raises CycleError
    rooms: dict[str, set[str]] = {}
    for name, imported in IMPORTS.items():
        if room_of(name):
            others = {room_of(other) for other in imported} - {room_of(name), ""}
            rooms.setdefault(room_of(name), set()).update(others)
    list(TopologicalSorter(rooms).static_order())


def test_the_rule_rejects_what_it_forbids(tmp_path):
    """The reader of imports sees those inside functions, and both forms."""
    path = tmp_path / "mutant.py"
    path.write_text("def f():\n    from dft.loss import head\n    import data_utils\n")
    assert imports_of(path) == {"dft.loss", "dft.loss.head", "data_utils"}


def test_no_function_takes_more_than_nine_parameters():
    """Settings travel as objects. The signature of an attention function is dictated by transformers."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name != "varlen_attention":
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                assert len([a for a in arguments if a.arg not in ("self", "cls")]) <= 9, f"{name}.{node.name}"


def test_importing_has_no_side_effects(tmp_path):
    """No file, no handler, no process group, no device."""
    code = (
        "import importlib, logging, os\n"
        f"for name in {sorted(MODULES)}: importlib.import_module(name)\n"
        "import torch\n"
        "assert not logging.getLogger('dft').handlers and not logging.getLogger().handlers\n"
        "assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()\n"
        "assert os.listdir('.') == []"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_no_module_is_named_like_an_installed_package():
    installed = {name for name, owners in packages_distributions().items() if set(owners) != {"dft-trainer"}}
    assert not installed & {*TOP_LEVEL, "dft"}


def test_no_file_touches_the_path_of_imports():
    listed = subprocess.run(["git", "ls-files", "*.py", "*.sh"], cwd=ROOT, capture_output=True, text=True).stdout
    touching = [name for name in listed.split() if "sys." + "path" in (ROOT / name).read_text(encoding="utf-8")]
    assert not touching
