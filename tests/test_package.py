"""What an installation gives: the package, the four modules, the listing of flags and the command."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers import ROOT, run


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the files that git knows, built apart from the checkout, which would keep leftovers of the build."""
    directory = tmp_path_factory.mktemp("package")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            target = directory / "tree" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", directory, directory / "tree"]
    result = run(command)
    assert result.returncode == 0, result.stdout[-3000:]
    return next(directory.glob("*.whl"))


def test_a_wheel_holds_the_package_and_the_four_modules_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "dft").rglob("*.py")}
    package |= {"dft/config/flags.json", "dft/judging/rubric.yaml"}
    assert names == package | {"train_dft.py", "dft_trainer.py", "data_utils.py", "dist_logger.py"}


def test_an_installed_wheel_has_the_command_and_imports_from_its_own_place(wheel, tmp_path):
    site = tmp_path / "site"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    result = run([sys.executable, *install])
    assert result.returncode == 0, result.stdout
    env = {**os.environ, "PYTHONPATH": str(site)}
    script = "import data_utils, dft.config.command_line as c, dft_trainer, dist_logger, train_dft\n"
    script += "print(*(m.__file__ for m in (data_utils, c, dft_trainer, dist_logger, train_dft)))"
    result = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert all(name.startswith(str(site)) for name in result.stdout.split()), result.stderr
    result = subprocess.run(
        [site / "bin" / "train-dft", "--dft_alpha", "2", "--model_name_or_path", "m", "--data_files", "d"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: --dft_alpha is 2.0; it must be between 0 (SFT) and 1 (pure DFT)\n"
