"""Draw the curves of several runs into one picture, to compare them.

    python scripts/plot_runs.py outputs/sft outputs/dft                                 # writes runs.png
    python scripts/plot_runs.py outputs/sft outputs/dft --names SFT DFT --output a.png

Each run is a directory with a train_log.jsonl. The picture shows cross-entropy and p_correct, of training (thin lines)
and evaluation (dots). It leaves the loss out, because runs with different alpha minimize different functions, whose
values can't be compared.
"""

from dft.program import program, quiet_imports

if __name__ == "__main__":  # before the imports that this is about
    quiet_imports()

import argparse
import json
import math
from pathlib import Path
from typing import Any

from dft.errors import UserError
from dft.files import path_argument
from dft.printable import printable
from dft.tracking.curves import PANELS, series

COMPARED = ("Cross-entropy (nats per token)", "Probability of the correct token")
KEYS = [key for title in COMPARED for key in PANELS[title].values()]
TRAINING = {"linestyle": "-", "linewidth": 1, "alpha": 0.6}
EVALUATION = {"linestyle": "-", "linewidth": 1.5, "marker": "o", "markersize": 5}


def main(argv: list[str] | None = None) -> None:
    """Draws the runs of the command line, and prints the path of the picture.

    Raises:
        UserError: a run that can't be read, names that don't fit, or a picture that can't be written.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=path_argument, metavar="RUN", help="output directory of a run")
    parser.add_argument("--names", nargs="+", help="one for each run; by default the names of the directories")
    parser.add_argument(
        "--output", type=path_argument, default=Path("runs.png"), help="the picture; by default runs.png"
    )
    args = parser.parse_args(argv)
    names = run_names(args.runs, args.names)
    picture = args.output if args.output.suffix else args.output.with_suffix(".png")
    plot_runs(dict(zip(names, map(read_log, args.runs), strict=True)), picture)
    print(printable(picture))


def run_names(runs: list[Path], names: list[str] | None) -> list[str]:
    """Names each run: as given, else by its directory's name, or by its whole path where two names are the same.

    Raises:
        UserError: not as many names as runs, or one name twice.
    """
    if names is None:
        names = [run.resolve().name for run in runs]
        if len(set(names)) < len(names):
            names = [str(run) for run in runs]
    if len(names) != len(runs):
        raise UserError(f"--names: {len(names)} names for {len(runs)} runs; give one for each")
    if len(set(names)) < len(names):
        raise UserError(f"two runs have the same name: {' '.join(names)}; give each its own with --names")
    return names


def read_log(run: Path) -> list[dict[str, Any]]:
    """Reads the records of a run's train_log.jsonl, where null stands for NaN.

    Raises:
        UserError: the file is missing, broken, or holds nothing to draw.
    """
    path = run / "train_log.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read ({error}); a run is the --output_dir of a training") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            int(record["step"])  # raises an error if it is missing or no number
            records.append({key: math.nan if value is None else value for key, value in record.items()})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}:{number}: not a record of a training ({error!r})") from error
    if not any(math.isfinite(record.get(key, math.nan)) for record in records for key in KEYS):
        raise UserError(f"{path} holds none of {', '.join(KEYS)}: nothing was logged yet, or not by this trainer")
    return records


def plot_runs(logs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draws runs into one picture, a panel for each of COMPARED.

    Args:
        logs: the records of each run, by its name.
        path: of the picture; its suffix chooses the format.

    Raises:
        UserError: the picture can't be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(COMPARED), figsize=(12, 4.8), layout="constrained")
    for axis, title in zip(axes, COMPARED, strict=True):
        for i, log in enumerate(logs.values()):
            for (label, key), style in zip(PANELS[title].items(), (TRAINING, EVALUATION), strict=True):
                steps, values = series(log, key)
                # a line through a single point would be invisible
                dot = {"marker": "."} if label == "train" and len(steps) == 1 else {}
                axis.plot(steps, values, color=f"C{i}", **style, **dot)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    # matplotlib would typeset what stands between two dollar signs as a formula
    names = [name.replace("$", r"\$") for name in logs]
    lines = [plt.Line2D([], [], color=f"C{i}", linewidth=3, label=name) for i, name in enumerate(names)]
    for label, style in (("training", TRAINING), ("evaluation", EVALUATION)):
        lines.append(plt.Line2D([], [], color="gray", label=label, **style))
    figure.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 6), frameon=False)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:  # ValueError is raised for an unknown format
        raise UserError(f"--output {path} can't be written: {error}") from error
    finally:
        plt.close(figure)


if __name__ == "__main__":
    with program():
        main()
