"""scripts/plot_runs.py draws the curves of several runs into one picture."""

import json

import pytest
from matplotlib.figure import Figure

from dft.errors import UserError
from scripts import plot_runs


def write_log(directory, ce: float, evaluated: bool = True):
    directory.mkdir(parents=True)
    records = [{"step": i, "ce_loss": ce / i, "train/avg_p_correct": 0.1 * i, "loss": 7.0} for i in (1, 2, 3)]
    records.append({"step": 4, "ce_loss": None, "loss": 7.0})
    if evaluated:
        records += [{"step": i, "eval_ce_loss": ce, "eval_avg_p_correct": 0.5, "eval_loss": 7.0} for i in (2, 3)]
    (directory / "train_log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


def test_runs_are_drawn_over_one_another(tmp_path, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **more: (figures.append(self), save(self, *args, **more))
    )
    runs = [write_log(tmp_path / "sft", 4.0), write_log(tmp_path / "dft", 2.0, evaluated=False)]
    plot_runs.main([*map(str, runs), "--output", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    cross_entropy, p_correct = figures[0].axes
    lines = [(line.get_color(), line.get_marker(), list(line.get_ydata())) for line in cross_entropy.lines]
    assert [(color, marker, values[:3]) for color, marker, values in lines] == [
        ("C0", "None", [4.0, 2.0, 4 / 3]),
        ("C0", "o", [4.0, 4.0]),
        ("C1", "None", [2.0, 1.0, 2 / 3]),
        ("C1", "o", []),
    ]
    assert max(max(line.get_ydata(), default=0) for line in p_correct.lines) == 0.5
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["sft", "dft", "training", "evaluation"]


def test_a_picture_is_where_it_is_said_to_be(tmp_path, capsys):
    plot_runs.main([str(write_log(tmp_path / "run", 4.0)), "--names", "$x_1$", "--output", str(tmp_path / "picture")])
    assert capsys.readouterr().out == f"{tmp_path / 'picture.png'}\n"
    assert (tmp_path / "picture.png").is_file()


def test_runs_are_named_by_their_directories_or_as_asked(tmp_path):
    first, second = tmp_path / "a" / "model", tmp_path / "b" / "model"
    assert plot_runs.run_names([first, tmp_path / "b"], None) == ["model", "b"]
    assert plot_runs.run_names([first, second], None) == [str(first), str(second)]
    assert plot_runs.run_names([first, second], ["SFT", "DFT"]) == ["SFT", "DFT"]


@pytest.mark.parametrize(
    ("log", "flags", "message"),
    [
        (None, [], "train_log.jsonl can't be read"),
        ("", [], "holds none of ce_loss, eval_ce_loss"),
        ('{"step": 1, "loss": 1.0}\n', [], "holds none of ce_loss"),
        ('{"step": 1, "ce_loss": null}\n', [], "holds none of ce_loss"),
        ('{"step": 1, "ce_loss": 1.0}\n{"st', [], "train_log.jsonl:2: not a record"),
        ('{"ce_loss": 1.0}\n', [], "train_log.jsonl:1: not a record of a training .*'step'"),
        ("[1]\n", [], "train_log.jsonl:1: not a record"),
        ('{"step": 1, "ce_loss": 1.0}\n', ["--names", "a", "b"], "2 names for 1 runs"),
        ('{"step": 1, "ce_loss": 1.0}\n', ["--output", "no/such/a.png"], "no/such/a.png can't be written"),
        ('{"step": 1, "ce_loss": 1.0}\n', ["--output", "a.picture"], "a.picture can't be written"),
    ],
)
def test_mistakes_in_runs_are_the_users(tmp_path, monkeypatch, log, flags, message):
    monkeypatch.chdir(tmp_path)
    if log is not None:
        (tmp_path / "train_log.jsonl").write_text(log)
    with pytest.raises(UserError, match=message):
        plot_runs.main([str(tmp_path), *flags])
