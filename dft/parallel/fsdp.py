"""A Trainer under FSDP2, which shards weights, gradients and optimizer, on GPUs and on CPUs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp.fully_sharded_data_parallel import StateDictType
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput


class ShardedTrainer(Trainer):
    """Trainer with what it and accelerate leave open under FSDP2.

    Raises:
        ValueError: FSDP1 is asked for, or accelerate has been set up without FSDP.
    """

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's; on CPUs too, with gradients that are averaged in float32 and stay sharded.

        Without it, accelerate would average them in the 16 bits that the model computes in. And Trainer would average
        them once a step, until when each process would hold all of them, unsharded.
        """
        with _fsdp_on_cpu(self.args):
            super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is not None and not self.is_fsdp_enabled:
            raise ValueError("accelerate has been set up without FSDP before: make the trainer first")
        if not self.is_fsdp_enabled:
            return
        if not self.accelerator.is_fsdp2:
            raise ValueError("FSDP1 is not supported: set version to 2 in fsdp_config (fsdp_version of accelerate)")
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)
        self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Trainer's; a model that hasn't been trained is sharded first, and gathered weights are dropped at the end.

        accelerate shards a model with an optimizer only, and takes the gathered weights of the head for other ones
        when it prepares a training.
        """
        if not self.is_fsdp_enabled:
            return super().evaluation_loop(*args, **kwargs)
        if not isinstance(self.model, FSDPModule):
            self.create_optimizer()
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model_wrapped = self.model
        output = super().evaluation_loop(*args, **kwargs)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return output

    def refuse_unwrapped(self, model: nn.Module) -> None:
        """accelerate doesn't wrap a model in DDP that evaluate() has prepared before."""
        if model.training and self.args.world_size > 1 and model is self.model and not self.is_fsdp_enabled:
            raise RuntimeError(
                "gradients would not be averaged over ranks: evaluate after train(), or use eval_on_start"
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's; the model is whole also where checkpoints are in shards, with which Trainer saves none."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        plugin = self.accelerator.state.fsdp_plugin
        kind, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            plugin.state_dict_type = kind


@contextmanager
def _fsdp_on_cpu(args: TrainingArguments) -> Iterator[None]:
    """Inside, accelerate gives FSDP to processes on CPUs too, for which it would take DDP, without a word.

    It asks for the kind of the processes alone, of which it knows FSDP for accelerators only. Nothing is changed where
    there are GPUs.
    """
    state = PartialState()
    is_changed = args.fsdp_plugin_args is not None and state.distributed_type == DistributedType.MULTI_CPU
    if is_changed:
        state.distributed_type = DistributedType.MULTI_GPU
    try:
        yield
    finally:
        if is_changed and state.distributed_type == DistributedType.MULTI_GPU:
            state.distributed_type = DistributedType.MULTI_CPU
