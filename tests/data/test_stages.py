"""The rows that sources stand for, the weights of shares and of --mix, and what the report says of them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from data_utils import prepare_data
from dft.batching.plan import BatchPlan
from dft.batching.stages import plan_stages
from dft.chat.format import ChatFormat
from dft.config.data import DataConfig
from dft.config.stages import Stage, load_stages
from dft.data.report import report_notes
from dft.data.selection import weights_of_ratios
from dft.data.stages import describe_stages, rows_of_stages
from dft.errors import UserError
from tests.helpers import CHATML_TEMPLATE, ROOT, write_jsonl

PATHS = ["/data/chats/code.jsonl", "/data/chats/math.jsonl", "/data/other/general.jsonl.gz"]
FILES = np.repeat([0, 1, 2], [30, 20, 50]).astype(np.int32)
FIELDS = np.where(np.arange(100) >= 90, 1, 0)  # the last ten rows of general say that they are poems
LENGTHS = np.random.default_rng(0).integers(10, 200, 100).astype(np.int32)
DATA = SimpleNamespace(
    report={"files": [{"path": path} for path in PATHS]},
    train_files=FILES,
    train_fields=FIELDS,
    field_names=["", "poems"],
    lengths=LENGTHS,
)


def stage(sources: dict[str, float], *, has_shares: bool = False, max_length: int | None = None) -> Stage:
    return Stage("s", sources, has_shares, None, 1, max_length, 1.0, "stages.yaml:7")


def rows_of(*args, mix_by: str = "tokens", **settings) -> dict[str, tuple[np.ndarray, float]]:
    return rows_of_stages([stage(*args, **settings)], DATA, mix_by)[0]


@pytest.mark.parametrize(
    ("source", "rows"),
    [
        ("code", range(30)),
        ("/data/chats/math.jsonl", range(30, 50)),
        ("/data/chats", range(50)),
        ("/data/*/general.*", range(50, 100)),
        ("poems", range(90, 100)),
        ("[cm]*", range(50)),
        ("*", range(100)),
    ],
)
def test_a_source_is_a_file_a_directory_or_a_channel(source, rows):
    assert [list(own) for own, _ in rows_of({source: 1.0}).values()] == [list(rows)]


@pytest.mark.parametrize(
    ("source", "rows"),
    [
        ("chats/*.jsonl", range(50)),
        ("chats", range(50)),
        ("./chats/[cm]a*", range(30, 50)),
        ("../run [[]1]*/other/*", range(50, 100)),
        ("~/chats/*.jsonl", range(50)),
    ],
)
def test_the_current_directory_is_no_part_of_a_pattern(source, rows, tmp_path, monkeypatch):
    here = tmp_path / "run [1]*"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    paths = [str(here / path.removeprefix("/data/")) for path in PATHS]
    data = SimpleNamespace(**{**vars(DATA), "report": {"files": [{"path": path} for path in paths]}})
    ((own, _),) = rows_of_stages([stage({source: 1.0})], data, "rows")[0].values()
    assert list(own) == list(rows)


def test_a_source_without_a_name_is_no_directory(monkeypatch):
    monkeypatch.chdir("/")
    with pytest.raises(UserError, match="no training row is of the source"):
        rows_of({"": 1.0})


def test_the_length_of_a_stage_is_a_limit_of_its_rows():
    ((own, weight),) = rows_of({"code": 0.5}, max_length=80).values()
    assert list(own) == [i for i in range(30) if LENGTHS[i] <= 80]
    assert weight == 0.5


@pytest.mark.parametrize("mix_by", ["tokens", "rows"])
def test_shares_are_of_what_is_drawn_and_repeat_nothing(mix_by):
    sources = rows_of({"code": 0.2, "math": 0.1, "general": 0.7}, has_shares=True, mix_by=mix_by)
    sizes = LENGTHS if mix_by == "tokens" else np.ones(100)
    seen = {name: weight * sizes[own].sum() for name, (own, weight) in sources.items()}
    assert [seen[name] / sum(seen.values()) for name in sources] == pytest.approx([0.2, 0.1, 0.7])
    assert max(weight for _, weight in sources.values()) == 1.0
    batches = BatchPlan("padding_free", 512, None, rows_per_batch=1, batches_per_step=1, seed=0, strategy="random")
    plan = plan_stages([stage({})], [sources], LENGTHS, batches, 0)
    drawn = plan.stages[0].rows
    assert np.bincount(drawn).max() == 1
    assert sizes[np.intersect1d(drawn, sources["general"][0])].sum() / sizes[drawn].sum() == pytest.approx(
        0.7, abs=0.05
    )


@pytest.mark.parametrize(
    ("sources", "settings", "message"),
    [
        ({"cod": 1}, {}, "stages.yaml:7: no training row is of the source cod; did you mean code?"),
        ({"a\x1b": 1}, {}, "the source a\\x1b; sources are files and the rows' fields 'channel': code, general"),
        ({"code": 1, "[cm]*": 1}, {}, "stage 's' has rows in two sources, one of them [cm]*; name each row once"),
        ({"general": 1, "poems": 1}, {}, "stage 's' has rows in two sources, one of them poems"),
        ({"code": 1}, {"max_length": 9}, "max_length 9 leaves no row of the source code, whose shortest has"),
    ],
)
def test_sources_that_are_none_are_refused(sources, settings, message):
    with pytest.raises(UserError) as caught:
        rows_of(sources, **settings)
    assert message in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_the_report_says_what_each_stage_sees():
    stages = [stage({"code": 2.0, "math": 1.0}), stage({"*": 0.5}, max_length=150)]
    sources = rows_of_stages(stages, DATA, "tokens")
    drawn = [(10, np.r_[0:30, 0:30, 30:50]), (5, sources[1]["*"][0][:40])]
    entries = describe_stages(stages, sources, drawn, LENGTHS)
    assert entries[0]["sources"]["code"] == {
        "rows": 30,
        "rows_seen": 60,
        "tokens_seen": 2 * int(LENGTHS[:30].sum()),
        "times_seen": 2.0,
    }
    assert (entries[0]["rows"], entries[0]["tokens"]) == (80, int(LENGTHS[drawn[0][1]].sum()))
    assert json.loads(json.dumps(entries)) == entries
    total = {
        "rejected": {},
        "remarks": {},
        "not_sampled": 0,
        "duplicates": 0,
        "leaked": 0,
        "control_tokens_in_text": 0,
    }
    first, second = report_notes({"total": total, "stages": entries})
    assert first.startswith("stage 1, s: steps 1 to 10, 80 rows, ")
    assert first.endswith("how often they are seen: code ×2, math ×1")
    assert second.startswith("stage 2, s: steps 11 to 15, 40 rows")
    assert second.endswith("; rows of at most 150 tokens")


# ---- the examples -------------------------------------------------------------------------------

EXAMPLES = sorted((ROOT / "examples" / "stages").glob("*.yaml"))


@pytest.fixture(scope="module")
def example_cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("examples"))


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_examples_plan_the_example_data(tokenizer, example_cache, path):
    """Of each source they draw about as many rows as they say."""
    config = DataConfig(
        [str(ROOT / "examples" / "data")], max_length=512, preprocessing_num_workers=1, data_cache_dir=example_cache
    )
    data = prepare_data(config, ChatFormat(tokenizer), progress=False)
    batches = BatchPlan("padding_free", 512, None, rows_per_batch=4, batches_per_step=1, seed=0)
    stages = load_stages(str(path))
    sources = rows_of_stages(stages, data, config.mix_by)
    plan = plan_stages(stages, sources, data.lengths, batches, batches.steps_of_run(data.lengths, -1, 3.0))
    drawn = [(planned.num_steps, planned.rows) for planned in plan.stages]
    for entry, written, planned in zip(
        describe_stages(stages, sources, drawn, data.lengths), stages, plan.stages, strict=True
    ):
        assert entry["rows"] == 4 * planned.num_steps
        assert data.lengths[planned.rows].max() <= (written.max_length or 512)
        for source, value in written.sources.items():
            seen = entry["sources"][source]
            if written.has_shares:
                assert seen["tokens_seen"] / entry["tokens"] == pytest.approx(value, abs=0.1)
            elif written.epochs is not None:
                assert seen["rows_seen"] == pytest.approx(value * seen["rows"], abs=4)


# ---- --mix --------------------------------------------------------------------------------------


def test_weights_of_ratios_repeat_nothing():
    rng = np.random.default_rng(0)
    for _ in range(50):
        ratios, amounts = rng.random(4) * (rng.random(4) > 0.2) + [0, 0, 0, 0.1], rng.integers(1, 1000, 4)
        seen = np.array(weights_of_ratios(ratios, amounts)) * amounts
        assert seen / seen.sum() == pytest.approx(ratios / ratios.sum())
        assert max(weights_of_ratios(ratios, amounts)) == 1.0


@pytest.fixture
def prepare_mixed(tokenizer, tmp_path):
    """The prepared data of a directory with two files and of a file, of 60 and 30 rows; the latter's are longer."""
    tokenizer.chat_template = CHATML_TEMPLATE
    (tmp_path / "short").mkdir()

    def chats(name: str, count: int, answer: str) -> None:
        messages = [
            [{"role": "user", "content": f"{name} {i}"}, {"role": "assistant", "content": answer}]
            for i in range(count)
        ]
        write_jsonl(tmp_path / f"{name}.jsonl", [{"messages": some} for some in messages])

    for name, count, answer in (("short/a", 40, "A."), ("short/b", 20, "A."), ("long", 30, "A long answer. " * 8)):
        chats(name, count, answer)
    files = [str(tmp_path / "short"), str(tmp_path / "long.jsonl")]

    def prepare(mix: str | None, data_files=files, **settings):
        config = DataConfig(
            data_files,
            mix=mix,
            validation_split_percentage=0.0,
            preprocessing_num_workers=1,
            data_cache_dir=str(tmp_path / "cache"),
            **settings,
        )
        return prepare_data(config, ChatFormat(tokenizer), seed=0, progress=False)

    return prepare


def test_files_stand_in_the_ratio_of_their_entries(prepare_mixed, tmp_path):
    by_rows = prepare_mixed("1:3", mix_by="rows")
    assert np.bincount(by_rows.train_files)[2] == 30
    assert np.bincount(by_rows.train_files)[:2].sum() == pytest.approx(10, abs=1)
    by_tokens = prepare_mixed("1:3")
    tokens = np.bincount(by_tokens.train_files, weights=by_tokens.lengths)
    assert tokens[2] / tokens[:2].sum() == pytest.approx(3, rel=0.1)
    assert len(by_tokens.train) == len(np.unique(by_tokens.train_lines * 3 + by_tokens.train_files))
    assert len(prepare_mixed("0:1").train) == 30
    assert len(prepare_mixed(None).train) == 90
    notes = " ".join(report_notes(by_tokens.report))
    assert "mixed by tokens, and how often rows are seen:" in notes
    assert f"{tmp_path}/long.jsonl 3 (×1)" in notes


def test_entries_that_have_no_rows_or_share_a_file_are_refused(prepare_mixed, tmp_path):
    unfit = write_jsonl(tmp_path / "unfit.jsonl", [{"messages": [{"role": "user", "content": "Hm"}]}])
    with pytest.raises(UserError, match=r"--mix 1:1: no row to train on in .*unfit.jsonl"):
        prepare_mixed("1:1", [str(tmp_path / "long.jsonl"), str(unfit)])
    with pytest.raises(UserError, match=r"long.jsonl: named twice, and --mix has a ratio for each name"):
        prepare_mixed("1:1", [str(tmp_path / "long.jsonl"), str(tmp_path / "long.*")])
