"""Answers in the evaluations of a training: the same model, metrics that decide over checkpoints, files and tables."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerState

from data_utils import load_conversations
from dft.answers.asking import check_metric
from dft.answers.questions import make_questions
from dft.answers.trainer import AnswerPlan
from dft.batching.varlen_attention import register
from dft.chat.format import ChatFormat
from dft.errors import UserError
from dft.tracking.answers import HEADER, AnswersLog, answers_of_step, answers_section, show_answers
from dft.tracking.console import print_lines
from dft.tracking.tracker_guard import GuardedTracker
from tests.answers.lessons import SCORERS
from tests.config.parsing import assert_refused, parse
from tests.helpers import flat_weights, read_log, tiny_run

NEW_TOKENS = 60
GROUPS = {f"answers/{source}/{scorer}" for source, scorer in SCORERS.items()}
AVERAGES = {"answers/score", "answers/ended", "answers/mean_tokens"}


@pytest.fixture
def plan(lessons, tokenizer):
    def make(name="right", max_new_tokens=NEW_TOKENS):
        rows = list(load_conversations([str(lessons[name])]))
        found = make_questions(rows, [row.channel for row in rows], ChatFormat(tokenizer), {}, 1000)
        return AnswerPlan(found.questions, max_new_tokens)

    return make


@pytest.fixture
def trainer_of(make_trainer, tokenizer, taught_model):
    """A trainer that asks a model that answers as it was taught, unless another is given."""

    def make(plan, model=None, **settings):
        return make_trainer(model or taught_model, processing_class=tokenizer, answers=plan, **settings)

    return make


def of_answers(metrics):
    return {key.removeprefix("eval_"): value for key, value in metrics.items() if key.startswith("eval_answers/")}


def test_evaluations_have_the_scores_of_the_answers(trainer_of, plan):
    metrics = of_answers(trainer_of(plan()).evaluate())
    assert metrics.keys() == AVERAGES | GROUPS
    assert {metrics[key] for key in metrics.keys() - {"answers/mean_tokens"}} == {1.0}
    metrics = of_answers(trainer_of(plan("wrong")).evaluate())
    assert {metrics[key] for key in metrics.keys() - {"answers/mean_tokens", "answers/ended"}} == {0.0}


def test_other_sets_are_not_asked(trainer_of, plan):
    trainer = trainer_of(plan())
    assert not of_answers(trainer.evaluate(metric_key_prefix="eval_other"))
    assert not any("answers" in key for key in trainer.predict(trainer.eval_dataset).metrics)


def test_answers_need_the_tokenizer(make_trainer, plan, taught_model):
    with pytest.raises(ValueError, match="answers need the tokenizer"):
        make_trainer(taught_model, answers=plan())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_asking_changes_nothing_of_the_training(trainer_of, plan, taught, checkpointing):
    """Neither a weight nor a random number: the second model has dropout."""
    weights = []
    for answers in (None, plan()):
        model = AutoModelForCausalLM.from_pretrained(taught, attention_dropout=0.1)
        settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3, "learning_rate": 1e-3}
        trainer = trainer_of(answers, model, gradient_checkpointing=checkpointing, **settings)
        trainer.train()
        weights.append(flat_weights(trainer.model))
        assert len(trainer.answers) == (0 if answers is None else 8)
    assert torch.equal(*weights)
    records = [of_answers(record) for record in trainer.state.log_history if "eval_ce_loss" in record]
    assert all(record.keys() == AVERAGES | GROUPS for record in records)
    assert len(records) == 3


def test_varlen_attention_gives_the_same_answers(trainer_of, plan, taught):
    register()
    model = AutoModelForCausalLM.from_pretrained(taught, attn_implementation="varlen")
    trainer = trainer_of(plan(), model)
    trainer.evaluate()
    assert all(answer.is_right for answer in trainer.answers)


def test_the_model_has_a_cache_and_is_not_compiled_for_answers(trainer_of, plan, taught_model):
    """Only prompts and single tokens are computed, though a training keeps the cache off."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    taught_model.config.use_cache = False
    trainer = trainer_of(plan(), torch_compile_backend="eager")
    trainer.args.torch_compile = True
    for layer in taught_model.model.layers:
        layer.compile(backend=count)
    lengths = []
    taught_model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: lengths.append(output.shape[1])
    )
    trainer._ask(replace(plan(), tokens_at_once=10_000))
    assert lengths.count(1) == len(lengths) - 1
    assert graphs == []


def test_a_score_decides_which_checkpoint_is_best(trainer_of, plan, tmp_path):
    """The first, whose answers are right: a large step makes all of them wrong."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    settings |= {"metric_for_best_model": "eval_answers/score", "greater_is_better": True, "learning_rate": 1.0}
    trainer = trainer_of(plan(), lr_scheduler_type="constant_with_warmup", warmup_steps=1, **settings)
    trainer.train()
    assert trainer.state.best_global_step == 1
    assert trainer.state.best_metric == 1.0


# ---- what is shown ------------------------------------------------------------------------------


def test_answers_are_logged_and_written_with_their_step(trainer_of, plan, tmp_path, caplog, capsys):
    caplog.set_level("INFO", "dft")
    (tmp_path / "answers.jsonl").write_text('{"step": 1}\n')  # of an earlier run
    trainer = trainer_of(plan(), eval_strategy="steps", eval_steps=1, learning_rate=0.0)
    show_answers(trainer)
    print_lines(trainer)
    trainer.train()
    (_, first, *_) = [record.getMessage() for record in caplog.records if "Answers at step" in record.getMessage()]
    assert first.startswith("Answers at step 2:\nanswers ")
    assert "(right by exact)\n  question   Capital of France?\n  reference  Paris.\n  answer     Paris." in first
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1] * 8 + [2] * 8
    assert "  answers 1.0000  " in capsys.readouterr().out
    assert len(answers_of_step(str(tmp_path), 2)) == 8


def test_a_resumed_run_keeps_the_answers_up_to_its_step(trainer_of, plan, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "ans')
    log = AnswersLog(trainer_of(plan()))
    log.on_train_begin(None, TrainerState(global_step=2), None)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    log.on_train_begin(None, TrainerState(global_step=0), None)
    assert path.read_text() == ""


@pytest.mark.parametrize("name", ["swanlab", "wandb"])
def test_a_tracker_gets_a_table_and_may_fail(name, trainer_of, plan, monkeypatch, caplog):
    trainer = trainer_of(plan(), eval_strategy="steps", eval_steps=1, learning_rate=0.0)
    trainer.args.report_to = [name]
    sent = []

    def log(data, **kwargs):
        sent.append(data)
        if len(sent) == 2:
            raise ConnectionError("the server is gone")

    monkeypatch.setattr(f"{name}.log", log)
    show_answers(trainer)
    trainer.args.max_steps = 3
    trainer.train()
    assert len(sent) == 2
    assert "Table failed and is dropped, the run goes on: ConnectionError" in caplog.text
    table = sent[0]["eval/answers_table"]
    if name == "wandb":
        columns, first = table.columns, table.data[0]
    else:
        columns, first = table.options["headers"], table.options["rows"][0]
    assert list(columns) == list(HEADER)
    assert first[1:] == ["facts", "Capital of France?", "Paris.", "Paris.", "yes", "yes"]
    guarded = [c for c in trainer.callback_handler.callbacks if isinstance(c, GuardedTracker)]
    assert len(guarded) == 1


def test_the_card_has_a_section_of_answers():
    bad = {"asked": "a|b\n# c", "reference": "<b>*x*", "answer": "\x1b[2J" + "y" * 1000, "tokens": 3}
    answers = [bad | {"source": "s|1", "scorer": "exact", "is_right": i == 0, "has_ended": True} for i in range(4)]
    section = answers_section(answers)
    assert "| s¦1 | exact | 4 | 0.2500 | 1.0000 |" in section
    assert "| a¦b\\\\n# c | &lt;b&gt;\\*x\\* | \\\\x1b\\[2Jyy" in section
    assert max(map(len, section.splitlines())) < 600
    assert answers_section([]) == ""


# ---- flags --------------------------------------------------------------------------------------


def test_flags_and_their_mistakes():
    assert parse().answers.eval_generations == 0
    answers = parse("--eval_generations", 5, "--answer_scorers", "a=exact", "*=regex:x=(.)").answers
    assert (answers.eval_max_new_tokens, answers.scorers) == (256, {"a": "exact", "*": "regex:x=(.)"})
    metric = ("--metric_for_best_model", "eval_answers/score")
    assert parse("--eval_generations", 5, *metric)[-1].greater_is_better is True
    for flags, message in (
        (["--eval_generations", "-1"], "--eval_generations is -1; it must be at least 0"),
        (["--eval_max_new_tokens", "0"], "--eval_max_new_tokens is 0; it must be at least 1"),
        (["--answer_scorers", "a=last"], "unknown scorer last"),
        (["--answer_scorers", "a=regex:["], "[ is no regular expression"),
        (
            ["--eval_generations", "5", "--validation_split_percentage", "0"],
            "--eval_generations 5 needs evaluation data: give --eval_data_files",
        ),
        (list(metric), "eval_answers/score is about the model's answers: give --eval_generations"),
    ):
        assert_refused(flags, message)


def test_a_metric_of_answers_must_be_of_these_questions(plan):
    questions = plan().questions
    for fine in (None, "eval_acc", "eval_answers/score", "answers/ended", "eval_answers/tools/tool_call"):
        check_metric(fine, questions)
    with pytest.raises(UserError, match="eval_answers/tools/exact; of answers there are eval_answers/score, .*/json"):
        check_metric("eval_answers/tools/exact", questions)


# ---- launches -----------------------------------------------------------------------------------


@pytest.mark.launch
def test_zero3_on_two_processes_gives_the_answers_of_one(taught, lessons, tmp_path, train_in):
    """With packed rows; of seven questions, so that one process has one more. No step changes the weights."""
    flags = ("--model_name_or_path", taught, "--data_files", lessons["right"], "--eval_data_files", lessons["wrong"])
    flags += ("--eval_generations", 7, "--eval_max_new_tokens", NEW_TOKENS, "--eval_steps", 1, "--learning_rate", 0)
    flags += ("--batching", "packed", "--max_length", 128, "--save_strategy", "no", "--report_to", "swanlab", "wandb")
    flags += ("--answer_scorers", "facts=regex:(P|M)", "--metric_for_best_model", "eval_answers/facts/regex")
    env = {"LAUNCHER": "deepspeed", "DS_CONFIG": "ds_config/zero3.json", "SWANLAB_API_KEY": "", "WANDB_API_KEY": ""}
    result = train_in(tmp_path, *flags, **env, HOME=str(tmp_path))
    out = tmp_path / "out"
    records = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    steps = [record.pop("step") for record in records]
    assert steps == [1] * 7 + [2] * 7
    first, second = records[:7], records[7:]
    assert first == second
    texts = ["Paris.", "Madrid.", "2 + 3 = 5", "4 + 4 = 8", '{"name": "Ann"}', '{"name": "Bob"}']
    assert [record["answer"] for record in first[:6]] == texts
    assert '"city": "Bonn"' in first[6]["answer"]
    evaluation = of_answers(next(record for record in read_log(out) if "eval_ce_loss" in record))
    assert (evaluation["answers/score"], evaluation["answers/ended"]) == (0.0, 1.0)
    assert "answers/facts/regex" in evaluation
    assert "## Answers" in (out / "README.md").read_text()
    assert json.loads((out / "run.json").read_text())["answers"]["eval_generations"] == 7
    assert "Answers: 7 evaluation rows are asked at each evaluation, facts by regex:(P|M), " in result.stdout
    assert "failed and is dropped" not in result.stdout
    assert len(list((out / "wandb").rglob("answers_table_*.table.json"))) == 2
    assert len(list((out / "swanlog").rglob("media/echarts/*.json"))) == 2


@pytest.mark.launch
def test_mistakes_in_the_data_end_with_status_2(taught, lessons, tmp_path, train_in):
    flags = (*tiny_run(taught, lessons["right"], tmp_path / "out"), "--eval_generations", 5)
    start = partial(train_in, tmp_path, *flags, "--eval_data_files", lessons["wrong"], expect=2)
    assert "no source is called fact; did you mean facts?" in start("--answer_scorers", "fact=exact").stdout
