"""Sequence parallelism: the parts of a batch make the whole, and each query head meets its key head.

Gradients on several processes are compared in tests/launch/test_invariance.py.
"""

import pytest
import torch
from transformers import Qwen3Config

from dft.batching.collators import FlatteningCollator, PaddingCollator, document_lengths
from dft.batching.sampler import RepeatedBatches
from dft.config.training import DFTTrainingArguments
from dft.constants import IGNORE_INDEX, REFERENCE_COLUMN
from dft.errors import UserError
from dft.loss.batch import Batch
from dft.loss.from_logits import dft_loss_sum, shift_labels
from dft.loss.token_weight import TokenWeight
from dft.parallel.ulysses import Part, check_attention, key_repeats, take_part, without_padding
from tests.launch.worker_data import small_tokenizer, uneven_rows

SIZES = (2, 3, 4)
VOCAB = 11


def batch_of(collator) -> Batch:
    """Five rows of different lengths, with weights, values by the starting weights, and channels."""
    rows = [dict(row) for row in uneven_rows(5)]
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        row["loss_weights"] = [0.5 + 0.01 * (number + place) for place in range(length)]
        row["channel"] = number % 3
    batch = collator(rows)
    batch[REFERENCE_COLUMN] = torch.randn(batch["labels"].shape, generator=torch.Generator().manual_seed(0))
    return Batch.of(batch)


@pytest.fixture(params=["padded", "padding_free"])
def batch(request) -> Batch:
    return batch_of(PaddingCollator(small_tokenizer()) if request.param == "padded" else FlatteningCollator())


def parts_of(batch: Batch, size: int) -> list[Part]:
    return [take_part(batch, rank, size) for rank in range(size)]


def tokens_of(batch: Batch):
    """The statistics of a batch by logits that depend on the token alone."""
    ids = batch.inputs["input_ids"] % VOCAB
    logits = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1))[ids]
    labels = torch.where(batch.labels == IGNORE_INDEX, IGNORE_INDEX, batch.labels % VOCAB)
    return dft_loss_sum(logits, labels, TokenWeight(0.7), batch.token_data("turn"))


@pytest.mark.parametrize("size", SIZES)
def test_each_token_is_in_one_part_with_what_is_known_of_it(batch, size):
    loss, tokens = tokens_of(batch)
    parts = parts_of(batch, size)
    results = [tokens_of(part) for part in parts]
    assert sum(float(part_loss) for part_loss, _ in results) == pytest.approx(float(loss), rel=1e-5)
    for name in ("targets", "nll", "weight", "reference_log_p"):
        joined = torch.cat([getattr(of_part, name) for _, of_part in results])
        torch.testing.assert_close(joined, getattr(tokens, name))
    for spread in ("document_of", "channel_of"):
        joined = torch.cat([getattr(part, spread)(of_part) for part, (_, of_part) in zip(parts, results, strict=True)])
        assert joined.tolist() == getattr(batch, spread)(tokens).tolist()
    assert sum(len(of_part.nll) > 0 for _, of_part in results) > 1  # it is cut within the supervised tokens


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("normalization", ["token", "turn"])
def test_what_is_counted_once_is_counted_once(batch, size, normalization):
    parts = parts_of(batch, size)
    assert sum(part.count_terms(normalization) for part in parts) == batch.count_terms(normalization)
    assert torch.cat([part.lengths for part in parts]).tolist() == batch.lengths.tolist()


@pytest.mark.parametrize("size", SIZES)
def test_parts_are_of_one_length_and_know_the_documents_of_the_row(batch, size):
    whole, parts = without_padding(batch), parts_of(batch, size)
    num_tokens = int(batch.lengths.sum())
    assert {part.num_positions for part in parts} == {-(-num_tokens // size)}
    ids, positions = (torch.cat([part.inputs[name] for part in parts], 1) for name in ("input_ids", "position_ids"))
    assert torch.equal(ids[:, :num_tokens], whole.inputs["input_ids"])
    for part in parts:
        lengths = document_lengths(part.inputs)
        assert lengths[: len(batch.lengths)].tolist() == batch.lengths.tolist()
        assert lengths.sum() == ids.numel()
        assert part.inputs["max_length_q"] == lengths.max()
        assert torch.equal(positions[0], torch.cat([torch.arange(length) for length in lengths]))


def test_nothing_predicts_the_first_token_of_a_document():
    padded, flat = (batch_of(collate) for collate in (PaddingCollator(small_tokenizer()), FlatteningCollator()))
    padded.labels[:, 0] = padded.inputs["input_ids"][:, 0]
    assert torch.equal(shift_labels(without_padding(padded).labels), shift_labels(flat.labels))


def test_an_input_that_can_not_be_divided_is_refused(batch):
    batch.inputs["token_type_ids"] = torch.zeros_like(batch.inputs["input_ids"])
    with pytest.raises(ValueError, match="token_type_ids"):
        take_part(batch, 0, 2)


@pytest.mark.parametrize("heads", [4, 8, 12])
def test_each_query_head_meets_its_key_head(heads):
    for key_heads in (n for n in range(1, heads + 1) if heads % n == 0):
        for size in (n for n in range(1, heads + 1) if heads % n == 0):
            repeats = key_repeats(heads, key_heads, size)
            keys = torch.arange(key_heads).repeat_interleave(repeats).chunk(size)  # of each process
            met = [mine[i * len(mine) * size // heads] for mine in keys for i in range(heads // size)]
            assert met == [head * key_heads // heads for head in range(heads)]


def test_ranks_that_follow_each_other_get_the_same_batches():
    order = RepeatedBatches(None, batch_size=2, times=3, dataset=range(5))
    assert list(order) == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3]
    assert len(order) == 12


@pytest.mark.parametrize(
    ("size", "attention", "words"),
    [
        (3, "varlen", "doesn't divide the 4 attention heads"),
        (2, "sdpa", "which sdpa doesn't: varlen"),
        (2, "eager", "eager"),
    ],
)
def test_attention_that_can_not_be_divided_is_refused(size, attention, words):
    with pytest.raises(UserError, match=words):
        check_attention(size, Qwen3Config(num_attention_heads=4), attention)


@pytest.mark.parametrize(("size", "attention"), [(1, "sdpa"), (4, "varlen"), (2, "flash_attention_2")])
def test_attention_that_can_be_divided_is_not_refused(size, attention):
    check_attention(size, Qwen3Config(num_attention_heads=4), attention)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"sequence_parallel_size": 0}, "is 0; it must be at least 1"),
        ({"sequence_parallel_size": 2}, "divide the number of processes, which is 1"),
    ],
)
def test_groups_that_the_processes_do_not_make_are_refused(tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        DFTTrainingArguments(output_dir=str(tmp_path), **flags)
