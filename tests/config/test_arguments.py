"""Flags: what they mean, how they combine, and the one message that a mistake gets."""

import json
import os
import pickle
import sys
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest
from accelerate.utils import HfDeepSpeedConfig

from dft.config.command_line import parse_args
from dft.config.listing import CACHE, load_listing, make_listing
from dft.config.loss import LossConfig
from dft.config.metrics import MetricsConfig
from dft.config.options import override
from dft.config.parser import build_parser, known_options
from dft.config.training import with_values
from dft.config.training_checks import check_writers
from dft.errors import UserError
from tests.config.parsing import NEEDED, assert_refused, parse
from tests.helpers import run


def test_defaults_of_the_original():
    model, _, data, dft, logging, _, training = parse()
    assert (dft.dft_alpha, data.max_length, data.validation_split_percentage) == (1.0, 8192, 5.0)
    assert (data.max_eval_samples, data.preprocessing_num_workers) == (1000, 8)
    assert (model.torch_dtype, model.attn_implementation, model.trust_remote_code) == ("bfloat16", "auto", False)
    assert training.activation_checkpointing is True
    assert logging.reduce_logging is True
    assert training.report_to == []


def test_old_and_other_spellings():
    model, _, data, _, _, _, training = parse(
        *("--train_data_path", "a.jsonl", "--eval_data_path", "b.jsonl", "c.jsonl", "--model_max_length", 99),
        *("--dtype", "float32", "--evaluation_strategy", "steps", "--gradient_checkpointing", "false"),
        *("--warmup_ratio", 0.05, "--logging_dir", "logs", "--save_safetensors", "True", "--save_only_model", 1),
    )
    assert (data.data_files, data.eval_data_files, data.max_length) == (["a.jsonl"], ["b.jsonl", "c.jsonl"], 99)
    assert model.torch_dtype == "float32"
    assert training.eval_strategy == "steps"
    assert training.activation_checkpointing is False
    assert training.get_warmup_steps(200) == 10
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "logs"
    assert training.save_only_model is True


@pytest.mark.parametrize("spelling", [["swanlab", "wandb"], ["swanlab,wandb"]])
def test_several_trackers(spelling):
    assert parse("--report_to", *spelling)[-1].report_to == ["swanlab", "wandb"]


def test_batches_are_counted_in_rows_or_in_tokens():
    assert parse()[-1].per_device_train_batch_size == 8
    assert parse("--per_device_train_batch_size", 3)[-1].per_device_train_batch_size == 3
    args = parse("--max_tokens_per_batch", 8192)[-1]
    assert (args.per_device_train_batch_size, args.max_tokens_per_batch, args.batching) == (1, 8192, None)
    assert parse("--batching", "packed")[-1].per_device_train_batch_size == 1
    assert (
        parse("--batching", "packed", "--max_tokens_per_batch", 99, "--max_length", 99)[-1].max_tokens_per_batch == 99
    )


def test_ligers_losses_are_off(monkeypatch):
    monkeypatch.setattr("dft.config.training.has_accelerator", lambda: True)
    monkeypatch.setattr("dft.config.training.is_liger_kernel_available", lambda: True)
    args = parse("--use_liger_kernel", "True", "--liger_kernel_config", '{"rope": false}', "--use_cpu", "True")[-1]
    assert args.liger_kernel_config == {
        "rope": False,
        "fused_linear_cross_entropy": False,
        "cross_entropy": False,
    }


def test_use_simple_dft_false_is_plain_cross_entropy():
    assert parse("--dft_alpha", 0.7, "--use_simple_dft", "False").loss.alpha == 0
    assert parse("--dft_alpha", 0.7).loss.alpha == 0.7


def test_evaluation_is_on_where_there_is_data_and_selects_by_accuracy():
    training = parse("--eval_steps", 7)[-1]
    assert (training.eval_strategy, training.eval_steps) == ("steps", 7)
    assert (training.metric_for_best_model, training.greater_is_better) == ("eval_acc", True)
    training = parse("--save_steps", 9)[-1]
    assert (training.eval_strategy, training.eval_steps) == ("steps", 9)
    assert parse("--save_strategy", "epoch")[-1].eval_strategy == "epoch"
    assert parse("--eval_strategy", "no")[-1].eval_strategy == "no"
    assert parse("--validation_split_percentage", 0)[-1].eval_strategy == "no"
    for metric, greater in {"eval_ce_loss": False, "eval_perplexity": False, "eval_avg_p_correct": True}.items():
        assert parse("--metric_for_best_model", metric)[-1].greater_is_better is greater


def test_training_arguments_survive_pickling():
    training = parse("--warmup_ratio", 0.1)[-1]
    assert pickle.loads(pickle.dumps(training)).warmup_steps == 0.1


def test_config_file_and_command_line(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "model_name_or_path: m\ndata_files: [a.jsonl, b.jsonl]\ndft_alpha: 0.3\nlearning_rate: 2e-6\n"
        "bf16: true\nrun_name: null\nenable_gradient_checkpointing: false\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\n"
    )
    _, _, data, dft, _, _, training = parse_args(["--config", str(config), "--dft_alpha", "0.9"])
    assert data.data_files == ["a.jsonl", "b.jsonl"]
    assert dft.dft_alpha == 0.9
    assert (training.learning_rate, training.bf16, training.activation_checkpointing) == (2e-6, True, False)
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}


WRONG = {
    "unknown flag": (["--dft_alfa", "1"], "unknown option --dft_alfa; did you mean --dft_alpha?"),
    "two unknown flags": (["--foo", "1", "--epochs=3"], "unknown option --foo"),
    "alpha above 1": (["--dft_alpha", "1.5"], "--dft_alpha is 1.5; it must be between 0 (SFT) and 1 (pure DFT)"),
    "alpha below 0": (["--dft_alpha", "-0.1"], "--dft_alpha is -0.1"),
    "alpha nan": (["--dft_alpha", "nan"], "--dft_alpha is nan"),
    "gamma 0": (["--dft_gamma", "0"], "--dft_gamma is 0.0; it must be above 0"),
    "floor above 1": (["--dft_floor", "1.5"], "--dft_floor is 1.5; it must be between 0 and 1"),
    "alpha warm-up above 1": (
        ["--dft_alpha_warmup_ratio", "2"],
        "--dft_alpha_warmup_ratio is 2.0; it must be between",
    ),
    "special tokens": (["--dft_special_tokens", "sft"], "invalid choice: 'sft'"),
    "normalization": (["--loss_normalization", "row"], "invalid choice: 'row'"),
    "fused": (["--fused_loss", "yes"], "invalid choice: 'yes'"),
    "chunk": (["--loss_chunk_mb", "0"], "--loss_chunk_mb is 0.0; it must be above 0"),
    "alpha word": (["--dft_alpha", "much"], "invalid float value: 'much'"),
    "max_length 0": (["--max_length", "0"], "--max_length is 0; it must be at least 1"),
    "split 100": (["--validation_split_percentage", "100"], "it must be at least 0 and below 100"),
    "split below 0": (["--validation_split_percentage", "-1"], "it must be at least 0 and below 100"),
    "workers 0": (["--preprocessing_num_workers", "0"], "--preprocessing_num_workers is 0"),
    "validation mode": (["--data_validation", "lax"], "lax"),
    "warm-up ratio 1": (["--warmup_ratio", "1.0"], "--warmup_ratio is 1.0; it must be at least 0 and below 1"),
    "two warm-ups": (["--warmup_ratio", "0.1", "--warmup_steps", "5"], "give one"),
    "no safetensors": (["--save_safetensors", "False"], "only safetensors is written"),
    "own normalization": (["--average_tokens_across_devices", "False"], "normalized over the global batch"),
    "label smoothing": (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor 0.1: the DFT loss has none"),
    "batch size 0": (
        ["--per_device_train_batch_size", "0"],
        "--per_device_train_batch_size is 0; it must be at least 1",
    ),
    "accumulation 0": (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps is 0"),
    "learning rate": (["--learning_rate", "-1"], "--learning_rate is -1.0"),
    "epochs 0": (["--num_train_epochs", "0"], "--num_train_epochs is 0"),
    "unknown metric": (["--metric_for_best_model", "eval_accuracy"], "it must be one of eval_acc"),
    "tracker": (["--report_to", "swanlabb"], "unknown tracker swanlabb; did you mean swanlab?"),
    "strategy": (["--eval_strategy", "sometimes"], "--eval_strategy is sometimes; it must be one of no, steps, epoch"),
    "python only": (["--parallelism_config", "{}"], "only given from Python"),
    "no checkpoints to keep": (["--save_total_limit", "0"], "--save_total_limit is 0; it must be at least 1"),
    "the best without evaluations": (
        ["--save_strategy", "best", "--eval_strategy", "no"],
        "--save_strategy best needs evaluations",
    ),
    "the best without data": (
        ["--save_strategy", "best", "--validation_split_percentage", "0"],
        "--save_strategy best needs evaluation data",
    ),
    "nothing to do": (
        ["--do_train", "False", "--validation_split_percentage", "0"],
        "--do_train False needs evaluation data",
    ),
    "nothing to go on with": (
        ["--do_train", "False", "--resume_from_checkpoint", "last"],
        "to evaluate a checkpoint, give it as --model_name_or_path",
    ),
    "evaluation without data": (
        ["--validation_split_percentage", "0", "--eval_strategy", "steps"],
        "--eval_strategy steps needs evaluation data",
    ),
    "deepspeed file": (["--deepspeed", "no/such.json"], "--deepspeed no/such.json: no such file"),
    "config file": (["--config", "no/such.yaml"], "--config no/such.yaml can't be read"),
    "fp16 on cpu": (["--fp16", "True"], "--fp16 needs a GPU"),
    "peak": (["--peak_tflops", "0"], "--peak_tflops is 0.0; it must be above 0"),
    "seed": (["--data_seed", "-1"], "--data_seed is -1; it must be at least 0"),
    "compiler": (["--torch_compile_backend", "indicator"], "--torch_compile_backend is indicator; it must be one of"),
    "rows that are lowered": (
        ["--max_tokens_per_batch", "9000", "--auto_find_batch_size", "True"],
        "--auto_find_batch_size lowers rows",
    ),
    "split batches": (["--accelerator_config", '{"split_batches": true}'], "take all batches to be of one size"),
    "batching": (["--batching", "flat"], "invalid choice: 'flat'"),
    "no tokens in a batch": (["--max_tokens_per_batch", "0"], "--max_tokens_per_batch is 0; it must be at least 1"),
    "rows and tokens": (["--max_tokens_per_batch", "9000", "--per_device_train_batch_size", "2"], "give one"),
    "no room for a row": (
        ["--max_tokens_per_batch", "100", "--max_length", "101"],
        "--max_tokens_per_batch is 100, but a row may have 104 tokens",
    ),
    "packed by length": (
        ["--batching", "packed", "--train_sampling_strategy", "group_by_length"],
        "--batching packed by how they fill a batch: drop one",
    ),
    "tokens by length": (
        ["--max_tokens_per_batch", "9000", "--train_sampling_strategy", "group_by_length"],
        "--max_tokens_per_batch by how they fill a batch",
    ),
    "liger on cpu": (["--use_liger_kernel", "True"], "--use_liger_kernel needs a GPU and the package liger-kernel"),
    "liger's loss": (
        ["--use_liger_kernel", "True", "--liger_kernel_config", '{"fused_linear_cross_entropy": true}'],
        "would replace the DFT loss",
    ),
    "negative steps": (["--logging_steps", "-3"], "--logging_steps is -3"),
    "metric steps": (["--log_metrics_steps", "0"], "--log_metrics_steps is 0"),
}


# what only transformers, or this machine, can tell
NEEDS_TORCH = ("fp16 on cpu", "split batches", "liger on cpu", "liger's loss")


@pytest.mark.parametrize("name", WRONG)
def test_mistakes(name):
    assert_refused(*WRONG[name])


def test_mistakes_and_help_are_found_before_torch_is_imported():
    quick = [flags for name, (flags, _) in WRONG.items() if name not in NEEDS_TORCH]
    script = (
        "import contextlib, io, sys\n"
        "from dft.config.command_line import parse_args\n"
        "from dft.errors import UserError\n"
        f"for flags in {quick}:\n"
        f"    with contextlib.suppress(UserError):\n"
        f"        parse_args([*{NEEDED}, *flags])\n"
        "        sys.exit(f'{flags} are taken')\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as text:\n"
        "    parse_args(['--help'])\n"
        "assert '--dft_alpha' in text.getvalue()\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'accelerate'} & set(sys.modules)))"
    )
    result = run([sys.executable, "-c", script])
    assert (result.returncode, result.stdout) == (0, "[]\n")


def test_the_cached_listing_of_flags_is_the_truth():
    """After a change of the flags or of a pinned version: python -m dft.config.listing."""
    assert json.loads(CACHE.read_text(encoding="utf-8")) == make_listing()


def test_a_listing_of_other_versions_is_not_used(monkeypatch, tmp_path):
    stale = make_listing() | {"made_from": {"torch": "1.0"}, "groups": {}}
    (tmp_path / "flags.json").write_text(json.dumps(stale), encoding="utf-8")
    monkeypatch.setattr("dft.config.listing.CACHE", tmp_path / "flags.json")
    assert load_listing() == make_listing()
    monkeypatch.setattr("dft.config.listing.CACHE", tmp_path / "missing.json")
    assert load_listing() == make_listing()


def test_settings_are_frozen_and_have_their_ranges_from_python_too():
    for config, name in ((LossConfig(), "dft_alpha"), (MetricsConfig(), "log_entropy")):
        with pytest.raises(FrozenInstanceError):
            setattr(config, name, 0.5)
    for wrong in ({"dft_alpha": 2.0}, {"loss_normalization": "row"}, {"fused_loss": "yes"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LossConfig(**wrong)


def test_keywords_override_a_configuration():
    keywords = {"dft_gamma": 2.0, "train_dataset": "rows"}
    assert override(LossConfig(dft_alpha=0.3), keywords) == LossConfig(dft_alpha=0.3, dft_gamma=2.0)
    assert keywords == {"train_dataset": "rows"}


def test_parsed_arguments_are_copied_not_changed():
    args = parse()[-1]
    assert with_values(args, batching="packed").batching == "packed"
    assert args.batching is None


def test_missing_flags_are_named():
    with pytest.raises(UserError, match="required: --model_name_or_path.*--data_files"):
        parse_args([])


def test_a_config_file_with_an_unknown_option_is_refused(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("dft_alpa: 1\n")
    with pytest.raises(UserError, match=r"run\.yaml: unknown option dft_alpa; did you mean --dft_alpha"):
        parse_args(["--config", str(config)])
    config.write_text("- dft_alpha\n")
    with pytest.raises(UserError, match="YAML mapping"):
        parse_args(["--config", str(config)])


def test_a_broken_deepspeed_file_is_named(tmp_path):
    broken = tmp_path / "zero.json"
    broken.write_text("{")
    with pytest.raises(UserError, match=r"zero\.json is not valid JSON"):
        parse("--deepspeed", broken)


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"checkpoint": {"writer": {"decoupled": True}}}, "checkpoint.writer.decoupled"),
        ({"datastates_ckpt": {"host_cache_size": 16}}, "datastates_ckpt"),
    ],
)
def test_checkpoints_that_deepspeed_writes_in_the_background_are_refused(setting, name):
    def with_settings(settings: dict) -> SimpleNamespace:
        return SimpleNamespace(deepspeed_plugin=SimpleNamespace(hf_ds_config=HfDeepSpeedConfig(settings)))

    check_writers(with_settings({"checkpoint": {"writer": {"decoupled": False}}}))
    with pytest.raises(UserError, match=f"{name} in --deepspeed has checkpoints written in the background"):
        check_writers(with_settings(setting))


def test_help_is_grouped_and_complete():
    listing = load_listing()
    text = build_parser(listing).format_help()
    for group in ("model:", "data:", "DFT loss:", "logging:", "training:", "all other training flags"):
        assert f"\n{group}" in text
    for option in known_options(listing):
        assert f"{option} " in text or f"{option}," in text or f"{option}\n" in text


@pytest.mark.launch
def test_a_mistake_is_one_message_and_status_2(tmp_path):
    missing = tmp_path / "missing.jsonl"
    result = run(["python", "train_dft.py", "--model_name_or_path", "m", "--data_files", missing, "--dft_alpha", "3"])
    assert result.returncode == 2
    errors = [text for text in result.stdout.splitlines() if text.startswith("error:")]
    assert len(errors) == 1
    assert "Traceback" not in result.stdout
