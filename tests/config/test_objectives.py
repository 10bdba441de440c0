"""Objectives on the command line: their parameters, and what is refused."""

from typing import get_args

import pytest

from dft.config.command_line import parse_args
from dft.config.loss import LossConfig, ObjectiveName
from dft.config.objectives import OBJECTIVES, read_arguments
from dft.errors import UserError
from dft.loss import objectives
from dft.loss.objectives import make_objective


def test_the_flag_knows_every_objective():
    assert get_args(ObjectiveName) == tuple(OBJECTIVES)
    assert {"dft", *objectives.OBJECTIVES} == set(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_made_from_its_defaults(name):
    made = make_objective(LossConfig(objective=name))
    assert made.needs.reference == OBJECTIVES[name].needs_reference
    for parameter, about in OBJECTIVES[name].parameters.items():
        assert getattr(made, parameter) == about.default


@pytest.mark.parametrize(
    "given",
    [
        ["exponent=2", "top_k=5"],
        ['{"exponent": 2, "top_k": 5}'],
        {"exponent": 2, "top_k": 5},
        ["exponent=2", '{"top_k": 5}'],
    ],
)
def test_parameters_are_words_or_a_mapping(given):
    values = read_arguments("eaft", given)
    assert values == {"exponent": 2.0, "top_k": 5, "scale": 3.0}
    assert isinstance(values["top_k"], int)


@pytest.fixture
def line(tmp_path):
    return ["--model_name_or_path", "m", "--data_files", "x.jsonl", "--output_dir", str(tmp_path)]


def test_flags_and_yaml_say_the_same(line, tmp_path):
    by_flags = parse_args([*line, "--objective", "anchored", "--objective_args", "strength=0.5", "max_ratio=4"]).loss
    file = tmp_path / "run.yaml"
    file.write_text("objective: anchored\nobjective_args: {strength: 0.5, max_ratio: 4}\n")
    by_file = parse_args([*line, "--config", str(file)]).loss
    assert by_flags.objective == by_file.objective == "anchored"
    assert by_flags.objective_arguments == by_file.objective_arguments == {"strength": 0.5, "max_ratio": 4.0}
    file.write_text("objective: anchored\nobjective_args: [strength=0.5, max_ratio=4]\n")
    assert parse_args([*line, "--config", str(file)]).loss.objective_arguments == by_flags.objective_arguments


REFUSED = [
    (["--objective", "eatf"], "invalid choice: 'eatf'; did you mean eaft? (choose from dft, sft, "),
    (
        ["--objective", "eaft", "--objective_args", "exponents=2"],
        "eaft has no parameter exponents; did you mean exponent?",
    ),
    (["--objective", "eaft", "--objective_args", "strength=2"], "strength belongs to anchored"),
    (
        ["--objective", "eaft", "--objective_args", "tau=2"],
        "tau belongs to threshold, talr; its parameters are exponent",
    ),
    (["--objective_args", "gamma=2"], "dft has no parameter gamma; it has no parameters"),
    (["--objective", "eaft", "--objective_args", "exponent"], "write it as name=value"),
    (["--objective", "eaft", "--objective_args", "exponent=two"], "exponent is 'two'; it must be a number"),
    (
        ["--objective", "eaft", "--objective_args", "exponent=-1"],
        "exponent is -1; it must be a finite number, 0 or more",
    ),
    (
        ["--objective", "eaft", "--objective_args", "exponent=inf"],
        "exponent is inf; it must be a finite number, 0 or more",
    ),
    (["--objective", "eaft", "--objective_args", "exponent=nan"], "exponent is nan; it must be a finite number"),
    (["--objective", "eaft", "--objective_args", "top_k=2.5"], "top_k is 2.5; it must be a whole number"),
    (["--objective", "threshold", "--objective_args", "tau=2"], "tau is 2; it must be from 0 to 1"),
    (["--objective", "eaft", "--objective_args", '{"exponent": true}'], "exponent is True"),
    (["--objective", "eaft", "--objective_args", "{exponent: 2}"], "is no JSON object"),
    (["--objective", "eaft", "--objective_args", "top_k=5", "top_k=6"], "top_k is given twice"),
    (["--objective", "importance", "--objective_args", "low=3"], "low is 3 and high is 1.8; low must be less"),
    (["--objective", "eaft", "--dft_gamma", "2"], "--dft_gamma belongs to --objective dft, not to eaft"),
    (["--objective", "eaft", "--use_simple_dft", "False"], "--use_simple_dft False is plain cross-entropy"),
    (["--objective", "anchored", "--dft_floor", "0.1"], "--dft_floor would cut the negative weights"),
    (["--objective", "sft", "--dft_floor", "0.1"], "--dft_floor has no effect on --objective sft"),
    (["--objective", "sft", "--dft_alpha_warmup_ratio", "0.1"], "--dft_alpha_warmup_ratio has no effect"),
    (["--dft_gamma", "0"], "--dft_gamma is 0.0; it must be above 0"),
    (["--dft_gamma", "inf"], "--dft_gamma is inf; it must be above 0"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_what_is_refused_says_why(line, flags, message):
    with pytest.raises(UserError) as caught:
        parse_args([*line, *flags])
    assert message in str(caught.value)


def test_an_unknown_objective_from_python_gets_the_nearest_name():
    with pytest.raises(UserError, match="--objective is 'eatf'; did you mean eaft\\?; it must be one of dft, sft"):
        LossConfig(objective="eatf")


def test_sft_has_alpha_0():
    assert LossConfig(objective="sft").alpha == LossConfig(use_simple_dft=False).alpha == 0.0
    assert LossConfig(objective="eaft", dft_alpha=0.7).alpha == 0.7


def test_the_formula_has_the_numbers_in_force():
    assert LossConfig().formula == "p**1"
    assert LossConfig(objective="threshold", objective_args={"tau": 0.3}).formula == (
        "p**power where p >= tau, else 0 (tau 0.3, power 0)"
    )
