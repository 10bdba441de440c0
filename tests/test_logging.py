"""Log records carry their true rank, and a log file is written once, by rank 0."""

import sys
import warnings

import pytest
from peft import LoraConfig, get_peft_model

from dft.errors import UserError
from dist_logger import get_logger, quiet_libraries, setup_logging
from examples.make_tiny_model import make_model
from tests.helpers import FULL, needs_full_disk, run, run_on

WORKER = """
import sys
from accelerate import PartialState
from dist_logger import get_logger, setup_logging
from dft.program import program
with program():
    logger = get_logger("early")
    setup_logging(sys.argv[1], only_rank_0=True)
    logger.info("before the group")
    PartialState(cpu=True)
    logger.info("after the group")
    logger.error("an error")
    setup_logging(sys.argv[2], only_rank_0=False)
    logger.info("said by all")
"""


@pytest.mark.launch
def test_two_processes_write_their_true_ranks(tmp_path):
    """Before they have joined a group, too; and above rank 0 only errors, or everything."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    logs = tmp_path / "logs" / "run.log", tmp_path / "logs" / "all.log"
    output = run_on(2, worker, *logs)
    for message, expected in {
        "before the group": ["0/2"],
        "after the group": ["0/2"],
        "an error": ["0/2", "1/2"],
        "said by all": ["0/2", "1/2"],
    }.items():
        lines = [text for text in output.splitlines() if text.endswith(message)]
        assert sorted(text.split("[RANK ")[1].split("]")[0] for text in lines) == expected
    first, second = (log.read_text().splitlines() for log in logs)
    assert [text.split(" - ")[-1] for text in first] == ["before the group", "after the group", "an error"]
    assert [text.split(" - ")[-1] for text in second] == ["said by all"]
    assert all("[RANK 0/2]" in text for text in [*first, *second])


def test_setting_up_twice_writes_once(tmp_path, capsys):
    for _ in range(2):
        setup_logging(tmp_path / "run.log")
    get_logger("here").info("hello")
    assert capsys.readouterr().err.count("hello") == 1
    assert (tmp_path / "run.log").read_text().count("hello") == 1


@needs_full_disk
def test_a_log_file_on_a_full_disk_is_dropped_with_one_warning(capsys):
    setup_logging(FULL)
    for message in ("one", "two", "three"):
        get_logger("here").info(message)
    lines = [text.split(" - ")[-1] for text in capsys.readouterr().err.splitlines()]
    expected = "/dev/full can't be written (No space left on device): the run goes on without it"
    assert lines == ["one", expected, "two", "three"]


def test_an_adapter_warns_of_no_name_that_peft_asks_by(tokenizer):
    model = make_model(len(tokenizer), hidden_size=32, num_layers=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_libraries(progress_bars=True)
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert not [warning for warning in caught if "is_gradient_checkpointing" in str(warning.message)]


def test_debug_records_are_shown_on_request(capsys):
    setup_logging()
    get_logger("here").debug("quiet")
    setup_logging(debug=True)
    get_logger("here").debug("loud")
    shown = capsys.readouterr().err
    assert "quiet" not in shown
    assert "loud" in shown


def test_an_unwritable_log_file_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        setup_logging(tmp_path / "file" / "run.log")


@pytest.mark.parametrize(
    ("body", "status", "said"), [("pass", 0, ""), ("raise UserError('bad flag')", 2, "error: bad flag\n")]
)
def test_a_program_ends_with_its_exit_handlers_threads_and_status(tmp_path, body, status, said):
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, sys, threading, time\n"
        "from dft.errors import UserError\n"
        "from dft.program import program\n"
        "atexit.register(lambda: sys.stdout.write('handler '))\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), sys.stdout.write('thread '))).start()\n"
        f"with program():\n    {body}\n"
    )
    result = run([sys.executable, script])
    assert (result.returncode, result.stdout) == (status, f"{said}thread handler ")
