"""The file of stages: what it says, and the one message that a mistake gets; and --mix."""

from fractions import Fraction
from pathlib import Path

import pytest

from dft.config.stages import load_stages
from dft.errors import UserError
from tests.config.parsing import NEEDED, assert_refused, parse
from tests.helpers import ROOT

ONE = "- {name: a, epochs: 1}\n"
EXAMPLES = sorted((ROOT / "examples" / "stages").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    def call(text: str) -> str:
        path = tmp_path / "stages.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return call


def test_what_a_file_says(write):
    text = """
- name: first
  sources: {a: 1/8, "b*": 2, c: 0}
  steps: 37.5 %
  max_length: 512
- name: second
  sources: {a: 70%, b: 100/5%, c: 10%}
  steps: 62.5%
  learning_rate_factor: 0.5
- name: third
  steps: 0.05%
"""
    first, second, third = load_stages(write(text))
    assert (first.name, first.sources, first.has_shares) == ("first", {"a": 0.125, "b*": 2.0}, False)
    assert (first.steps, first.epochs, first.max_length, first.learning_rate_factor) == (
        Fraction(3, 8),
        None,
        512,
        1.0,
    )
    assert second.sources == pytest.approx({"a": 0.7, "b": 0.2, "c": 0.1})
    assert second.has_shares
    assert (second.max_length, second.learning_rate_factor) == (None, 0.5)
    assert third.sources == {"*": 1.0}
    assert third.place.endswith("stages.yaml:10")
    (alone,) = load_stages(write("- name: a\n  epochs: 1/2\n"))
    assert (alone.steps, alone.epochs) == (None, 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "stages.yaml holds no stages; it must be a YAML list"),
        ("[]", "stages.yaml holds no stages"),
        ("name: a", "stages.yaml holds no stages"),
        ("- [", "stages.yaml can't be read"),
        ("- a\n", "stages.yaml:1: a stage must be a mapping"),
        (
            ONE + "- name: b\n  epochs: 1\n  sorces: {a: 1}\n",
            "stages.yaml:4: unknown key sorces; did you mean sources?",
        ),
        (ONE + ONE, "stages.yaml:2: two stages are called 'a'"),
        ("- {epochs: 1}\n", "stages.yaml:1: a stage needs a name"),
        ("- {name: [a], epochs: 1}\n", "stages.yaml:1: a stage needs a name"),
        ("- name: a\n  name: b\n", "stages.yaml:2: name is given twice"),
        ("- name: a\n  epochs: 1\n  sources: {a: 1, a: 2}\n", "stages.yaml:3: a is given twice"),
        ("- {name: a}\n", "stage 'a' needs either steps, such as 30%, or epochs, such as 1"),
        ("- {name: a, steps: 100%, epochs: 1}\n", "stage 'a' needs either"),
        ("- name: a\n  steps: 30\n", "stages.yaml:2: steps is 30; it must be a share of the training, such as 30%"),
        ("- name: a\n  epochs: 30%\n", "stages.yaml:2: epochs is 30%; it must be a plain number"),
        ("- name: a\n  epochs: -1\n", "stages.yaml:2: epochs is -1; it must be above 0"),
        ("- name: a\n  epochs: 1e9\n", "stages.yaml:2: epochs is 1e9; it must be a number such as 2, 0.5, 1/8 or 30%"),
        ("- name: a\n  epochs: 1/0\n", "stages.yaml:2: epochs is 1/0; it must be a number"),
        ("- name: a\n  epochs:\n", "stages.yaml:2: epochs is empty; it must be a number"),
        ("- name: a\n  epochs: .nan\n", "epochs is .nan; it must be a number"),
        ("- {name: a, steps: 60%}\n- {name: b, steps: 30%}\n", "the steps of the stages add up to 90%"),
        ("- {name: a, steps: 100%}\n- {name: b, epochs: 1}\n", "some stages are in steps and others in epochs"),
        ("- {name: a, epochs: 1, sources: {}}\n", "sources must be a mapping of sources to numbers"),
        ("- {name: a, epochs: 1, sources: [x]}\n", "sources must be a mapping of sources to numbers"),
        ("- {name: a, epochs: 1, sources: {x: 0}}\n", "stages.yaml:1: all sources have 0"),
        ("- {name: a, epochs: 1, sources: {x: 2, y: -1}}\n", "the source y has -1; it must be at least 0"),
        ("- {name: a, epochs: 1, sources: {x: 70%, y: 1}}\n", "some sources have percents and others plain numbers"),
        ("- {name: a, epochs: 1, sources: {x: 70%, y: 20%}}\n", "the shares of the sources add up to 90%"),
        ("- {name: a, epochs: 1, max_length: 0}\n", "max_length is 0; it must be above 0"),
        ("- {name: a, epochs: 1, max_length: 1.5}\n", "max_length is 1.5; it must be a whole number of tokens"),
        ("- {name: a, epochs: 1, learning_rate_factor: 0}\n", "learning_rate_factor is 0; it must be above 0"),
        ("- name: a\n  epochs: 1\n  sources: {'': 1}\n", "stages.yaml:3: a source has no name; name a file"),
        ("- name: a\n  epochs: 1\n  sources: {a: 1, ' ': 1}\n", "stages.yaml:3: a source has no name"),
        (
            "- name: a\n  epochs: 1\n  sources:\n    ? [a, b]\n    : 1\n",
            "stages.yaml:4: a list or a mapping stands where a name must be",
        ),
        ("- {name: a, epochs: 1, sources: {{a: 1}: 1}}\n", "stages.yaml:1: a list or a mapping stands where a name"),
        ("- name: a\n  ? [epochs]\n  : 1\n", "stages.yaml:2: a list or a mapping stands where a name must be"),
        ("[" * 3000, "stages.yaml can't be read: it is nested too deeply"),
        ("- " * 3000 + "a", "stages.yaml can't be read: it is nested too deeply"),
        ('- "\\UFFFFFFFF"', "stages.yaml can't be read"),
        ('- "\\U00110000"', "stages.yaml can't be read"),
        ('- {name: "a\\e[2J", epochs: 1, "k\\e": 1}\n', "unknown key k\\x1b"),
    ],
)
def test_a_mistake_is_refused_with_its_place(write, text, message):
    with pytest.raises(UserError) as caught:
        load_stages(write(text))
    assert message in str(caught.value)
    assert "stages.yaml" in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"--stages .*none.yaml can't be read"):
        load_stages(str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match=r"--stages .*none\\x00.yaml can't be read"):
        load_stages(str(tmp_path / "none\0.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_examples_parse_and_name_the_example_data(path):
    stages = load_stages(str(path))
    known = {file.name.split(".")[0] for file in (ROOT / "examples" / "data").iterdir()} | {"*"}
    assert {source for stage in stages for source in stage.sources} <= known
    assert parse("--stages", path).data.stages == str(path)


def test_the_examples_are_the_strategies_that_the_document_names():
    assert {path.stem for path in EXAMPLES} == {
        *("multi_task", "sequential", "mixed_sequential", "dmt", "curriculum_length", "core_to_tail")
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data_weights", 2], "--stages says how often rows are seen, and so does --data_weights"),
        (["--mix", "1"], "--stages says how often rows are seen, and so does --mix"),
        (["--train_sampling_strategy", "batch_rebalance"], "batch_rebalance has an order of its own"),
        (["--auto_find_batch_size", "True"], "whose number --auto_find_batch_size changes"),
        (["--num_train_epochs", 2], "the stages of"),
    ],
)
def test_flags_that_say_the_same_in_another_way_are_refused(write, flags, message):
    assert_refused(["--stages", write(ONE), *flags], message)
    parse("--stages", write("- {name: a, steps: 100%}\n"), "--num_train_epochs", 2)
    parse("--stages", write(ONE), "--max_steps", 2)


def test_mistakes_in_the_file_are_found_with_those_of_flags(write):
    assert_refused(["--stages", write("")], "holds no stages")
    assert_refused(["--stages", str(Path(write("")).parent / "none.yaml")], "can't be read")


# ---- --mix --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("6:2:1", "--mix 6:2:1 has 3 ratios for 2 --data_files"),
        ("21721", "In a YAML file it needs quotes, '6:2:1'"),
        ("0:0", "--mix is 0:0, so that there would be nothing to train on"),
        ("1:-1", "--mix is 1:-1; it must be numbers of at least 0"),
        ("1:nan", "it must be numbers of at least 0"),
        ("1,2", "it must be numbers of at least 0"),
        ("", "it must be numbers of at least 0"),
    ],
)
def test_ratios_that_are_none_are_refused(mix, message):
    assert_refused(["--data_files", "a.jsonl", "b.jsonl", f"--mix={mix}"], message)


def test_ratios_replace_weights():
    flags = ["--data_files", "a.jsonl", "b.jsonl", "--mix", "0.6:2"]
    data = parse(*flags).data
    assert (data.mix_ratios, data.mix_by) == ([0.6, 2.0], "tokens")
    assert parse(*NEEDED).data.mix_ratios == []
    assert_refused([*flags, "--data_weights", 1, 2], "--mix and --data_weights both say how often rows are seen")
