"""DFTTrainer: Hugging Face's Trainer with the DFT loss, its metrics, and a token-weighted evaluation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from accelerate.utils import DynamoBackend
from accelerate.utils.other import is_repeated_blocks
from torch.utils.data import Dataset, IterableDataset, Sampler
from transformers import Trainer, TrainingArguments

from dft.batching.collators import document_lengths, token_channels
from dft.batching.leak_check import assert_apart, needs_check
from dft.batching.packing import DOCUMENTS
from dft.batching.sampler import EpochOrder, FilledRows, TellEpoch, token_lengths
from dft.loss.finite_check import FiniteCheck
from dft.loss.from_logits import Normalization, TokenWeight, count_terms, dft_loss_sum, token_scales
from dft.loss.fused import CHUNK_MB
from dft.loss.head import LossHead, UnsupportedHead
from dft.metrics.throughput import model_flops
from dft.metrics.throughput import peak_tflops as known_peak_tflops
from dft.metrics.token_sums import TokenSums, averages, channel_averages, health
from dft.metrics.training import LastRecord, TrainingMetrics
from dist_logger import get_logger

logger = get_logger(__name__)


class DFTTrainer(Trainer):
    """Trainer whose loss weighs each supervised token by max(floor, alpha * p_correct**gamma + 1 - alpha), detached.

    The loss of a step is sum(w * nll) / N with N counted over the whole global batch, so it doesn't
    depend on how the batch is cut into ranks and micro-batches. It works on any dataset with
    `input_ids` and `labels` (-100 where nothing is supervised). A column `loss_weights` (float) multiplies
    the loss of each token; ce_loss, p_correct and accuracy are not weighted by it.

    Args:
        dft_alpha: 0 for plain SFT to 1 for pure DFT.
        dft_gamma, dft_floor: see dft_loss.TokenWeight.
        dft_alpha_warmup_ratio: share of the steps in which alpha rises linearly from 0 to dft_alpha.
        plain_tokens: ids of tokens whose loss is plain cross-entropy.
        loss_normalization: token divides the loss by the supervised tokens of the global batch; turn takes
            the mean over each assistant turn, and divides their sum by the turns of the global batch.
        fused_loss: on computes the loss in the model's head, without logits; off from the model's logits;
            auto in the head if it is one that is known.
        loss_chunk_mb: MB of logits that the fused loss holds at once, see fused_loss.CHUNK_MB.
        source_of_row: where a training row comes from, for the error of a loss that is NaN or infinite.
        channels: names of the sources that a column `channel` (int, from 0) of the rows numbers; each has metrics.
        log_entropy: add the entropy of the model's predictions.
        row_lengths: tokens of each training row, for train_sampling_strategy group_by_length; by default counted.
        peak_tflops: what one device could do at most, for mfu; by default known for common GPUs.
        log_metrics_steps: add the DFT metrics only to log records at least this many steps apart, and to the last;
            None adds them to every record.
        All others are Trainer's own.

    Logged with every training record, over all ranks and micro-batches since the last one:
        loss                 sum(w * nll) / N, or the mean over turns
        ce_loss              sum(nll) / N, what SFT would report
        train/avg_p_correct  sum(p) / N
        train/dft_alpha      the alpha in force
        token_accuracy       share of supervised tokens whose arg-max is right
        mean_weight          sum(w) / N
        p_below_0.01, p_above_0.99   shares of supervised tokens
        entropy              mean over supervised tokens, in nats; if it is asked for
        channel/NAME/ce_loss, channel/NAME/p_correct, channel/NAME/acc   of one source
        tokens_per_second, supervised_tokens_per_second, memory_gib
        padding_share        of the positions that the model computed
        mfu                  share of the devices' peak, see throughput.ModelFlops; where the peak is known
    At its end: train_steps, train_tokens, train_supervised_tokens, and both per second of training alone.
    Evaluation: loss, ce_loss, perplexity, avg_p_correct, acc, mean_weight, the shares, entropy and channels of the
    whole set, behind the metric prefix.
    predict() repeats rows to even out ranks, as Trainer does, and counts them.

    Raises:
        ValueError: a number outside its range, or an option that would change the loss behind its back.
        UnsupportedHead (a ValueError): fused_loss is on, and this model's head is not one that is known.
    """

    # Trainer must not divide by the accumulation count: the loss is divided by the global token count
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model=None,
        args: TrainingArguments | None = None,
        *,
        dft_alpha: float = 1.0,
        dft_gamma: float = 1.0,
        dft_floor: float = 0.0,
        dft_alpha_warmup_ratio: float = 0.0,
        plain_tokens: tuple[int, ...] = (),
        loss_normalization: Normalization = "token",
        fused_loss: Literal["auto", "on", "off"] = "auto",
        loss_chunk_mb: float | None = None,
        source_of_row: Callable[[int], str] | None = None,
        row_lengths: Sequence[int] | None = None,
        peak_tflops: float | None = None,
        log_metrics_steps: int | None = None,
        channels: Sequence[str] = (),
        log_entropy: bool = False,
        **kwargs,
    ):
        self.token_weight = TokenWeight(dft_alpha, dft_gamma, dft_floor, tuple(plain_tokens))
        if not 0.0 <= dft_alpha_warmup_ratio <= 1.0:
            raise ValueError(f"dft_alpha_warmup_ratio must be between 0 and 1, got {dft_alpha_warmup_ratio}")
        if loss_normalization not in ("token", "turn"):
            raise ValueError(f"loss_normalization must be token or turn, got {loss_normalization!r}")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("DFTTrainer computes the loss itself: drop compute_loss_func")
        super().__init__(model, args, **kwargs)
        self._order: EpochOrder | None = None  # of the training rows
        self.add_callback(TellEpoch(lambda: self._order))
        self.add_callback(LastRecord())
        self._refuse_what_changes_the_loss()
        self._warn_of_the_loss_as_a_measure()
        if self.args.torch_compile:
            self._compile_layers()
        self.dft_alpha_warmup_ratio = dft_alpha_warmup_ratio
        self.loss_normalization = loss_normalization
        self.loss_head = self._choose_loss_head(fused_loss, loss_chunk_mb)
        self._fused_loss = fused_loss
        self._needs_no_logits = False  # in this step of the evaluation
        self._num_batches = 1  # micro-batches of this step
        self._batches_to_do = 0  # of them
        self._finite_check = FiniteCheck(self.train_dataset, source_of_row)
        self._row_lengths = row_lengths
        self._may_leak = True  # until documents of one row are seen to be apart
        self._peak_tflops = peak_tflops if peak_tflops is not None else known_peak_tflops(self.args.device)
        self._flops = None if self._peak_tflops is None else model_flops(self.model)
        self.log_metrics_steps = log_metrics_steps
        self.channels = list(channels)
        self.log_entropy = log_entropy
        # the count of supervised tokens is taken in get_batch_samples, whatever the model's signature
        self.model_accepts_loss_kwargs = False
        self._eval_sums = TokenSums(self.args.device, len(self.channels))
        self._train_metrics = self._new_metrics()

    def _refuse_what_changes_the_loss(self) -> None:
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        if parallelism is not None and (parallelism.sp_size > 1 or parallelism.cp_size > 1 or parallelism.tp_size > 1):
            raise ValueError("DFTTrainer does not support sequence, context or tensor parallelism")
        if self.args.label_smoothing_factor:
            raise ValueError("label_smoothing_factor has no meaning for the DFT loss: set it to 0")
        if self.args.n_gpu > 1:
            raise ValueError("DataParallel is not supported: start one process per GPU (torchrun, deepspeed)")

    def _warn_of_the_loss_as_a_measure(self) -> None:
        metric = self.args.metric_for_best_model
        if metric is not None and metric.removeprefix("eval_") == "loss" and self.token_weight.alpha > 0:
            logger.warning(
                "metric_for_best_model is %s: the DFT loss also falls where correct tokens become very unlikely, and "
                "doesn't tell which checkpoint is best; eval_ce_loss and eval_acc do",
                metric,
            )

    def _compile_layers(self) -> None:
        """Compiles the model's layers and leaves what is around them, the head among it, as it is.

        They are compiled in place, where accelerate would compile the whole or put copies in their place.
        """
        self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        options = {"backend": self.args.torch_compile_backend, "mode": self.args.torch_compile_mode}
        stacks = [module for module in self.model.modules() if is_repeated_blocks(module)]
        if not stacks:
            raise ValueError(f"torch_compile: {type(self.model).__name__} has no stack of layers to compile")
        for layer in (layer for stack in stacks for layer in stack):
            layer.compile(**options)

    def _choose_loss_head(self, fused_loss: str, chunk_mb: float | None) -> LossHead | None:
        """The head that computes the loss, None to compute it from logits; says which and why."""
        chunk_mb = CHUNK_MB.get(self.args.device.type, CHUNK_MB["cpu"]) if chunk_mb is None else chunk_mb
        if chunk_mb <= 0:
            raise ValueError(f"loss_chunk_mb must be above 0, got {chunk_mb}")
        if fused_loss == "off":
            return None
        try:
            head = LossHead(self.model, chunk_mb)
        except UnsupportedHead as error:
            return self._without_loss_head(fused_loss, error)
        how = f"called chunk by chunk ({head.wrapping})" if head.wrapping else "fused with the loss"
        logger.info("Loss: the head is %s, no more than %g MB of logits at once", how, chunk_mb)
        return head

    def _without_loss_head(self, fused_loss: str, error: UnsupportedHead) -> None:
        if fused_loss == "on":
            raise UnsupportedHead(f"fused_loss is on, but {error}; turn it off") from error
        logger.warning("Loss: from the model's logits, which takes more memory: %s", error)

    def _new_metrics(self) -> TrainingMetrics:
        return TrainingMetrics(
            self.args.device,
            channels=self.channels,
            with_entropy=self.log_entropy,
            min_steps=self.log_metrics_steps,
            flops=self._flops,
            peak_tflops=self._peak_tflops,
        )

    def _inner_training_loop(self, *args, **kwargs):
        """Trainer's; metrics start anew, also where auto_find_batch_size tries again."""
        self._train_metrics = self._new_metrics()
        return super()._inner_training_loop(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """Trainer's; the training's speed doesn't pay for it."""
        with self._train_metrics.not_training():
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        """Trainer drops the columns that the model's forward doesn't take; the loss and the collators take more."""
        super()._set_signature_columns_if_needed()
        more = {"loss_weights", DOCUMENTS, *(["channel"] if self.channels else [])}
        self._signature_columns += more - set(self._signature_columns)

    # ---- the loss -------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one step, and the supervised tokens (or turns) of all ranks to divide by."""
        self._train_metrics.start(self.state.global_step)
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [count_terms(batch["labels"], self.loss_normalization) for batch in batches]
        count = torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.int64)
        self._num_batches = self._batches_to_do = len(batches)
        self._finite_check.begin()
        return batches, self.accelerator.reduce(count.to(device), reduction="sum")

    def alpha_at(self, step: int) -> float:
        """The alpha of a step, counted from 0."""
        warmup_steps = self.dft_alpha_warmup_ratio * self.state.max_steps
        return self.token_weight.alpha * (1.0 if step >= warmup_steps else step / warmup_steps)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """sum(w * nll) of this micro-batch over the supervised tokens (or turns) of the global batch, a scalar."""
        if model.training and self.args.world_size > 1 and model is self.model and not self.is_fsdp_enabled:
            # accelerate doesn't wrap a model for training that evaluate() has prepared before
            raise RuntimeError(
                "gradients would not be averaged over ranks: evaluate after train(), or use eval_on_start"
            )
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        loss_weights = inputs.pop("loss_weights", None)
        channel = inputs.pop("channel", None)
        inputs.pop("skip_logits", None)  # Trainer asks Liger models to skip them in evaluation
        weight = self.token_weight
        if self._may_leak and needs_check(inputs):
            with self.compute_loss_context_manager():
                self._may_leak = not assert_apart(model, inputs, self.model.config.get_text_config().vocab_size)
        if model.training:
            weight = replace(weight, alpha=self.alpha_at(self.state.global_step))
        scales = token_scales(labels, loss_weights, self.loss_normalization)
        fuse = self.loss_head is not None and (self._needs_no_logits or not return_outputs)
        loss_sum, tokens, outputs = self._score(model, inputs, labels, weight, scales, fuse)

        num_terms = count_terms(labels, self.loss_normalization)
        sums = self._train_metrics.sums if model.training else self._eval_sums
        weights = weight(tokens.p_correct, tokens.targets)
        if channel is not None:
            channel = token_channels(channel, labels, inputs).flatten()[tokens.places] if self.channels else None
        sums.add(loss_sum, num_terms, tokens, weights, document_lengths(inputs), labels.numel(), channel)

        if num_items_in_batch is None:  # evaluation: the metrics come from the sums
            num_items_in_batch = num_terms
        loss = loss_sum / num_items_in_batch.clamp(min=1)
        if model.training:
            # DDP and ZeRO average the gradients of the ranks; the count is already that of all ranks
            loss = loss * self.accelerator.num_processes
            if getattr(outputs, "aux_loss", None) is not None:  # of the routers of mixture-of-experts models
                loss = loss + self._router_coefficient() * outputs.aux_loss.to(loss.device) / self._num_batches
            self._check_finite(loss, inputs)
        return (loss, outputs) if return_outputs else loss

    def _router_coefficient(self) -> float:
        config = self.model.config.get_text_config()
        return config.router_aux_loss_coef if hasattr(config, "router_aux_loss_coef") else config.aux_loss_coef

    def _check_finite(self, loss: torch.Tensor, inputs: dict) -> None:
        """Stops before the last backward pass of a step (DeepSpeed changes weights in it) if a loss is not finite."""
        if self._batches_to_do == 0:  # not called by train()
            return
        self._finite_check.note(loss, inputs)
        self._batches_to_do -= 1
        if self._batches_to_do == 0:
            self._finite_check.stop(self.state.global_step + 1)

    def _score(self, model, inputs, labels, weight, scales, fuse: bool):
        """Loss sum, statistics of the tokens, and the model's outputs, whose logits are not real where `fuse`."""
        if not fuse:
            outputs = model(**inputs)
            return *dft_loss_sum(outputs.logits, labels, weight, scales, self.log_entropy), outputs
        try:
            with self.loss_head.computing(labels, weight, scales, self.log_entropy) as result:
                outputs = model(**inputs)
            loss_sum, tokens = result.take(outputs.logits)
            self.loss_head.check(outputs.logits)
        except UnsupportedHead as error:
            self.loss_head = self._without_loss_head(self._fused_loss, error)
            return self._score(model, inputs, labels, weight, scales, fuse=False)
        return loss_sum, tokens, outputs

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Trainer's; where only the loss is wanted, no logits are made."""
        self._needs_no_logits = bool(prediction_loss_only)
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._needs_no_logits = False

    # ---- metrics --------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with the DFT metrics added to training records. Every rank calls it."""
        if "loss" in logs and "learning_rate" in logs:
            step, is_last = self.state.global_step, self.state.global_step >= self.state.max_steps
            logs.update(self._train_metrics.record(self.accelerator, step, self.alpha_at(step - 1), is_last))
        elif "train_runtime" in logs:
            logs.update(self._train_metrics.totals(self.accelerator, self.state.global_step))
        super().log(logs, start_time)

    # ---- rows -----------------------------------------------------------------------------------

    def _get_dataloader(self, dataset, description, batch_size, *args, **kwargs):
        """Trainer's; training and evaluation sets are filled up so that no rank repeats a row to keep up."""
        fills = description == "Evaluation" or (description == "Training" and not self.args.dataloader_drop_last)
        if fills and self.args.world_size > 1 and FilledRows.can_fill(dataset):
            dataset = FilledRows(dataset, batch_size * self.args.world_size)
        return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """The order of the training rows, see EpochOrder."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        is_sized = hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)
        if strategy == "batch_rebalance" or not is_sized:
            return super()._get_train_sampler(train_dataset)
        rows = dataset.rows if isinstance(dataset, FilledRows) else dataset
        lengths = None
        if strategy == "group_by_length":
            lengths = token_lengths(rows) if self._row_lengths is None else self._row_lengths
        args = self.args
        order = EpochOrder(
            len(rows),
            len(dataset),
            seed=args.seed if args.data_seed is None else args.data_seed,
            strategy=strategy or "random",
            lengths=lengths,
            rows_per_step=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        )
        self._order = order
        return order

    # ---- evaluation -----------------------------------------------------------------------------

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """Trainer's loop; its loss, a mean of batch means, is replaced by sums divided once."""
        self._eval_sums.values.zero_()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = self._eval_sums.take(self.accelerator)
        if sums[TokenSums.SUPERVISED] > 0:  # not where rows without labels are predicted
            metrics = averages(sums) | health(sums, self.log_entropy) | channel_averages(sums, self.channels)
            metrics["perplexity"] = math.exp(min(metrics["ce_loss"], 700.0))
            output.metrics.update({f"{metric_key_prefix}_{key}": value for key, value in metrics.items()})
        if isinstance(dataloader.dataset, FilledRows):
            output = output._replace(num_samples=len(dataloader.dataset.rows))
        return output
