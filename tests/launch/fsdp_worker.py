"""Started by test_invariance.py on two processes: gradients under FSDP2, with the loss in the head and from logits.

    torchrun --nproc-per-node 2 tests/launch/fsdp_worker.py OUT.pt

Rank 0 writes {"sharded again": {"logits": [P], "head": [P], "head of rank 0": [P]}, "left whole": …} in float32;
"head of rank 0" is the gradient where both ranks have the batch of rank 0.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dft.loss.from_logits import dft_loss_sum
from dft.loss.head import LossHead
from dft.loss.token_weight import TokenWeight
from dft.program import program
from examples.make_tiny_model import make_model
from tests.launch.worker_data import VOCAB_SIZE

CHUNK_MB = 7 * 4 * VOCAB_SIZE / 1e6  # 7 rows of logits


def gradient(is_fused: bool, is_sharded_again: bool, batch_of_rank: int) -> torch.Tensor:
    """The gradient of all parameters, [P], of a batch that differs by rank."""
    model = make_model(VOCAB_SIZE, hidden_size=32, num_layers=2).train()
    head = LossHead(model, CHUNK_MB)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=is_sharded_again)
    generator = torch.Generator().manual_seed(batch_of_rank)
    ids = torch.randint(VOCAB_SIZE, (2, 20 + 10 * batch_of_rank), generator=generator)
    if is_fused:
        with head.computing(ids, TokenWeight(0.7)) as result:
            outputs = model(input_ids=ids)
        loss, _ = result.take(outputs.logits)
        head.check(outputs.logits)
    else:
        loss, _ = dft_loss_sum(model(input_ids=ids).logits, ids, TokenWeight(0.7))
    loss.backward()
    return torch.cat([parameter.grad.full_tensor().flatten() for parameter in model.parameters()])


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    gradients = {
        name: {
            "logits": gradient(False, is_sharded_again, rank),
            "head": gradient(True, is_sharded_again, rank),
            "head of rank 0": gradient(True, is_sharded_again, 0),
        }
        for name, is_sharded_again in (("left whole", False), ("sharded again", True))
    }
    if rank == 0:
        torch.save(gradients, sys.argv[1])


if __name__ == "__main__":
    with program():
        main()
