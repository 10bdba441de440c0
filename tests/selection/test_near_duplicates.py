"""near-dedup on planted near-duplicates, independent rows, chains and templates."""

import numpy as np
import pytest

from dft.errors import UserError
from dft.reading.rows import Conversation
from dft.selection.near_duplicates import NearDedupConfig, near_dedup, near_duplicates, rows_per_band
from dft.selection.shingles import shingles, text_of, tokenize
from tests.selection.rows import Writer, as_row, conversation


def jaccard(one: Conversation, other: Conversation, size: int = 3) -> float:
    first, second = (set(shingles(tokenize([text_of(row)]), size).values.tolist()) for row in (one, other))
    return len(first & second) / len(first | second)


@pytest.mark.parametrize("num_words", [60, 220])
def test_planted_near_duplicates_are_found_and_independent_rows_kept(num_words):
    writer = Writer(num_words)
    originals = [writer.words(num_words) for _ in range(1500)]
    copies = [writer.edited(words, per_100=5) for words in originals[:300]]
    rows = [as_row(words) for words in originals + copies]
    clusters = near_duplicates(rows)
    pairs = {frozenset((cluster.kept, member)) for cluster in clusters for member in cluster.members}
    found = sum(frozenset((i, 1500 + i)) in pairs for i in range(300))
    assert found >= 0.95 * 300
    assert len(pairs) == found  # no independent row is dropped


def test_similarities_are_estimates_of_the_exact_ones():
    writer = Writer(1)
    originals = [writer.words(200) for _ in range(60)]
    rows = [as_row(words) for words in originals]
    rows += [as_row(writer.edited(words, per_100=i % 12)) for i, words in enumerate(originals)]
    clusters = near_duplicates(rows, NearDedupConfig(threshold=0.4, num_perm=256))
    errors = [
        similarity - jaccard(rows[cluster.kept], rows[member])
        for cluster in clusters
        for member, similarity in zip(cluster.members, cluster.similarities, strict=True)
    ]
    assert len(errors) == 60
    assert abs(np.mean(errors)) < 0.02
    assert np.max(np.abs(errors)) < 5 * (0.25 / 256) ** 0.5  # of the largest standard deviation


def test_the_longest_row_is_kept_and_of_equal_ones_the_first():
    words = Writer(2).words(200)
    rows = [as_row(words), as_row([*words, "longer"]), as_row([*words, "longer"]), as_row(words[:-1])]
    (cluster,) = near_duplicates(rows)
    assert cluster.kept == 1
    assert sorted(cluster.members) == [0, 2, 3]


def test_only_what_is_compared_counts_as_length():
    """Neither the words of the system, nor those of the other roles where one part is compared."""
    words = Writer(9).words(200)
    rows = [as_row(words[:-1]), as_row(words)]
    rows[0].messages.insert(0, {"role": "system", "content": "You are a helpful assistant."})
    (cluster,) = near_duplicates(rows)
    assert cluster.kept == 1
    prompt = " ".join(words)
    rows = [conversation(prompt, "a longer answer"), conversation(f"{prompt} more", "yes")]
    (cluster,) = near_duplicates(rows, NearDedupConfig(part="user"))
    assert cluster.kept == 1


def test_every_dropped_row_is_similar_to_the_one_that_is_kept():
    """In a chain each row is similar to the next; its ends are not similar, and one doesn't replace the other."""
    writer = Writer(3)
    chain = [writer.words(300)]
    for _ in range(12):
        chain.append(chain[-1][15:] + writer.words(15))
    rows = [as_row(words) for words in chain]
    assert jaccard(rows[0], rows[1]) > 0.85
    assert jaccard(rows[0], rows[-1]) < 0.4
    clusters = near_duplicates(rows)
    assert len(clusters) > 1
    for cluster in clusters:
        assert all(jaccard(rows[cluster.kept], rows[member]) > 0.5 for member in cluster.members)


def test_templates_below_the_threshold_are_kept():
    """Rows that share half of their words, and more of them than a bucket holds."""
    writer = Writer(4)
    template = writer.words(60)
    rows = [as_row(template + writer.words(60)) for _ in range(300)]
    assert 0.25 < jaccard(rows[0], rows[1]) < 0.45
    assert near_duplicates(rows) == []


def test_the_words_of_the_system_are_not_compared():
    writer = Writer(5)
    rows = [as_row(writer.words(30)) for _ in range(50)]
    for row in rows:
        row.messages.insert(0, {"role": "system", "content": "You are a helpful assistant. " * 50})
    assert near_duplicates(rows) == []


def test_chinese_is_compared_by_characters():
    text = "".join(chr(0x4E00 + 37 * i % 5000) for i in range(120))
    rows = [
        conversation("问题", text),
        conversation("问题", text.replace(text[50], "的")),
        conversation("问题", text[::-1]),
    ]
    (cluster,) = near_duplicates(rows)
    assert (cluster.kept, cluster.members) == (0, [1])


def test_part_compares_prompts_alone():
    writer = Writer(6)
    prompt = " ".join(writer.words(50))
    rows = [conversation(prompt, " ".join(writer.words(80))) for _ in range(3)]
    assert near_duplicates(rows) == []
    assert len(near_duplicates(rows, NearDedupConfig(part="user"))[0].members) == 2


def test_rows_without_words_are_kept():
    assert near_duplicates([conversation("…", "!?")] * 3) == []
    assert near_duplicates([]) == []


def test_bands_find_pairs_at_the_threshold():
    for threshold in (0.3, 0.6, 0.8, 0.95, 1.0):
        size = rows_per_band(threshold, 128)
        found = [1 - (1 - threshold**r) ** (128 // r) for r in (size, size + 1)]
        assert found[0] >= 0.98
        assert size == 128 or found[1] < 0.98


def test_verdicts_name_the_kept_row():
    words = Writer(7).words(100)
    rows = [as_row(words, line=4), as_row(Writer(8).words(100), line=5), as_row(words[:-1], line=6)]
    decision = near_dedup(NearDedupConfig())(iter(rows))
    assert [verdict.reason for verdict in decision.verdicts] == ["", "", "near_duplicate"]
    assert "rows.jsonl:4" in decision.verdicts[2].detail
    (cluster,) = decision.tables["clusters.jsonl"]
    assert cluster["size"] == 2
    assert cluster["kept"] == {"path": "rows.jsonl", "line": 4}
    assert cluster["members"][0]["line"] == 6
    assert cluster["members"][0]["jaccard"] == pytest.approx(decision.verdicts[2].score, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.0}, "--threshold is 0.0"),
        ({"threshold": 1.5}, "--threshold is 1.5"),
        ({"threshold": float("nan")}, "--threshold is nan"),
        ({"shingle": 0}, "--shingle is 0"),
        ({"num_perm": 4}, "--num_perm is 4"),
        ({"part": "system"}, "--part is system"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        NearDedupConfig(**settings)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    with pytest.raises(UserError, match=r"rensa: pip install -e .\[selection\]"):
        near_dedup(NearDedupConfig())
