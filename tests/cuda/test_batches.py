"""Training on a GPU: one gradient however rows become batches, and the stop at a loss that is NaN."""

import pytest
import torch

from dft.batching.collators import FlatteningCollator, PaddingCollator
from dft.batching.packing import PackedRows, best_fit_decreasing
from dft.batching.sampler import token_lengths
from dft.batching.varlen_attention import register
from dft_trainer import DFTTrainer
from examples.make_tiny_model import make_model
from tests.cuda.precision import tolerance
from tests.helpers import change_of_weights, relative_error, rows

pytestmark = pytest.mark.cuda

LEARNING_RATE = 64.0  # so that the weights change by much more than they are rounded
ROUNDINGS = 8  # what some sixty roundings of activations and their gradients, in two layers, come to


@pytest.fixture
def trainer_of(make_trainer, tokenizer, device):
    """Makes a trainer of 16 rows in one step of plain SGD, whose change of the weights is the gradient."""

    def make(batching: str, attention: str, collator=None, **settings) -> DFTTrainer:
        register()
        model = make_model(600, hidden_size=32, num_layers=2)
        model.set_attn_implementation(attention)
        data = rows(16)
        packed = PackedRows(data, best_fit_decreasing(token_lengths(data), 96))
        is_packed = batching == "packed"
        defaults = {
            "max_steps": 1,
            "per_device_train_batch_size": 1 if is_packed else 4,
            "gradient_accumulation_steps": len(packed) if is_packed else 4,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "dft_alpha": 0.7,
            "use_cpu": device.type == "cpu",
        }
        trainer = make_trainer(model, train_dataset=packed if is_packed else data, **defaults | settings)
        plain = PaddingCollator(tokenizer) if batching == "padded" else FlatteningCollator()
        trainer.data_collator = collator or plain
        assert trainer.args.device.type == device.type
        return trainer

    return make


class OneDocument(FlatteningCollator):
    """The mutant whose documents are one."""

    def __call__(self, features):
        batch = super().__call__(features)
        length = batch["input_ids"].shape[1]
        boundaries = torch.tensor([0, length], dtype=torch.int32)
        return batch | {
            "position_ids": torch.arange(length)[None],
            **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), boundaries),
            **dict.fromkeys(("max_length_q", "max_length_k"), length),
        }


@pytest.mark.parametrize("is_16_bit", [False, True], ids=["float32", "bfloat16 by autocast"])
@pytest.mark.parametrize("batching", ["padded", "padding_free", "packed"])
def test_the_gradient_of_a_global_batch_is_the_same(trainer_of, batching, is_16_bit):
    """Documents of a row are kept apart by varlen, on a GPU in 16 bits by PyTorch's kernels."""
    expected = change_of_weights(trainer_of("padded", "eager", per_device_train_batch_size=16)).cpu()
    found = change_of_weights(trainer_of(batching, "varlen", bf16=is_16_bit)).cpu()
    dtype = torch.bfloat16 if is_16_bit else torch.float32
    rounding = tolerance(dtype, ROUNDINGS, 96)
    assert relative_error(found, expected) < rounding
    if batching == "padding_free":
        mutant = change_of_weights(trainer_of(batching, "varlen", collator=OneDocument(), bf16=is_16_bit)).cpu()
        assert relative_error(mutant, expected) > 3 * rounding


@pytest.mark.parametrize("batching", ["padded", "padding_free"])
def test_a_loss_that_is_nan_stops_the_run_before_its_step(trainer_of, batching):
    trainer = trainer_of(
        batching,
        "varlen",
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        train_sampling_strategy="sequential",
        source_of_row="chats.jsonl:{}".format,
    )
    seen = [set(trainer.train_dataset[i]["input_ids"]) for i in range(8)]
    token = next(iter(seen[6] - set.union(*seen[:6])))  # of the second step's second micro-batch
    weight = trainer.model.get_input_embeddings().weight
    hook = make_nan_when_seen(trainer, token)
    before = weight.detach().clone()
    with pytest.raises(FloatingPointError, match=r"in step 2. The rows of its batch: chats.jsonl:6, chats.jsonl:7\."):
        trainer.train()
    hook.remove()
    assert trainer.state.global_step == 1
    assert torch.isfinite(weight).all()
    assert not torch.equal(weight, before)  # the first step was made


def make_nan_when_seen(trainer: DFTTrainer, token: int):
    """The embedding of this token is NaN where it is looked up; a NaN in a tied head would reach every loss."""

    def forward(module, inputs, output):
        return output.masked_fill((inputs[0] == token)[..., None], float("nan"))

    return trainer.model.get_input_embeddings().register_forward_hook(forward)
