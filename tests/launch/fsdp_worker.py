"""Started by test_invariance.py on two processes: FSDP2 with the loss in the head, and from logits.

    torchrun --nproc-per-node 2 tests/launch/fsdp_worker.py

Prints for each kind of sharding the relative difference of the gradients; ends with an error if it is above 1e-5.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dft.loss.from_logits import TokenWeight, dft_loss_sum
from dft.loss.head import LossHead
from dft.program import program
from examples.make_tiny_model import make_model

CHUNK_MB = 7 * 4 * 400 / 1e6  # 7 rows of logits


def gradients(way: str, reshard: bool) -> torch.Tensor:
    """All gradients of one model after the same backward pass, whole."""
    model = make_model(400, hidden_size=32, num_layers=2).train()
    head = LossHead(model, CHUNK_MB)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(400, (2, 20 + 10 * dist.get_rank()), generator=generator)
    if way == "logits":
        loss, _ = dft_loss_sum(model(input_ids=ids).logits, ids, TokenWeight(0.7))
    else:
        with head.computing(ids, TokenWeight(0.7)) as result:
            outputs = model(input_ids=ids)
        loss, _ = result.take(outputs.logits)
        head.check(outputs.logits)
    loss.backward()
    return torch.cat([parameter.grad.full_tensor().flatten() for parameter in model.parameters()])


def main() -> None:
    dist.init_process_group("gloo")
    for reshard in (False, True):
        expected, found = (gradients(way, reshard) for way in ("logits", "head"))
        error = float((found - expected).norm() / expected.norm())
        print(f"resharded {reshard}: {error:.1e}", flush=True)
        if not error < 1e-5:
            raise SystemExit(1)


if __name__ == "__main__":
    with program():
        main()
