"""DFTTrainer: Hugging Face's Trainer with the DFT loss, its metrics, and a token-weighted evaluation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler
from transformers import Trainer, TrainingArguments

from dft.answers.trainer import AnsweringTrainer
from dft.batching.leak_check import LeakCheck
from dft.batching.packing import DOCUMENTS
from dft.batching.sampler import EpochOrder, FilledRows, RepeatedBatches, SetEpochCallback, token_lengths
from dft.checkpoints.trainer import CheckpointTrainer
from dft.config.loss import CHUNK_MB, LossConfig
from dft.config.metrics import MetricsConfig
from dft.config.options import override
from dft.config.training import num_batches_at_once, sequence_parallel_size
from dft.constants import REFERENCE_COLUMN
from dft.loss.batch import Batch
from dft.loss.finite_check import FiniteCheck
from dft.loss.from_logits import count_terms
from dft.loss.objectives import Talr, make_objective
from dft.loss.scorer import Scorer
from dft.loss.statistics import Needs, TokenStatistics
from dft.loss.temperature import Temperature
from dft.loss.token_weight import TokenWeight
from dft.metrics.throughput import model_flops
from dft.metrics.throughput import peak_tflops as known_peak_tflops
from dft.metrics.token_sums import TokenSums, averages, channel_averages, health
from dft.metrics.training import LogLastStepCallback, TrainingMetrics
from dft.model.adapters import keep_products_exact
from dft.model.compiled import compile_layers
from dft.model.tokenizer import special_token_ids
from dft.nonfinite import FiniteTrainer
from dft.parallel.fsdp import ShardedTrainer
from dft.parallel.ulysses import SequenceGroup
from dft.reference.trainer import ReferenceTrainer
from dft.staged import StagedTrainer
from dft.stopping import StopRequest
from dist_logger import get_logger

logger = get_logger(__name__)

# Trainer of transformers 5.17 divides by the accumulation count whatever `loss_is_scaled_for_ga` says
TRAINER_DIVIDES_LOSS = not hasattr(Trainer, "loss_is_scaled_for_ga")


class DFTTrainer(ShardedTrainer, CheckpointTrainer, ReferenceTrainer, StagedTrainer, AnsweringTrainer, FiniteTrainer):
    """Trainer whose loss weights each supervised token by alpha * p_correct + 1 - alpha, or by another objective.

    The loss of a step is sum(w * nll) / N with N counted over the whole global batch, so it doesn't
    depend on how the batch is cut into ranks and micro-batches. It works on any dataset with
    `input_ids` and `labels` (-100 where nothing is supervised). A column `loss_weights` (float) multiplies
    the loss of each token; ce_loss, p_correct and accuracy are not weighted by it.

        DFTTrainer(model, args, dft_alpha=0.7, train_dataset=rows)
        DFTTrainer(model, args, loss=LossConfig(dft_alpha=0.7), metrics=MetricsConfig(log_entropy=True), ...)

    Args:
        loss, metrics: all settings of the loss and of the metrics, see LossConfig and MetricsConfig, whose fields are
            keyword arguments too (dft_alpha, dft_gamma, fused_loss, log_entropy, ...) and then take precedence.
        token_weight: a function of dft.loss.statistics.TokenStatistics that gives the weights of N tokens, [N], in
            place of the objective; what it needs besides p it says in an attribute `needs`. Alpha, floor and plain
            tokens are applied to it too.
        plain_tokens: ids of tokens whose loss is plain cross-entropy, besides those of dft_special_tokens="ce".
        source_of_row: where a training row comes from, for the error of a loss that is NaN or infinite.
        channels: names of the sources that a column `channel` (int, from 0) of the rows numbers; each has metrics.
        row_lengths: tokens of each training row, for train_sampling_strategy group_by_length; by default counted.
        stages: of the training, see StagedTrainer; they decide the order of the rows.
        answers: what the model is asked at each evaluation, see AnswerPlan.
        made_with: see CheckpointTrainer, which also keeps the best and the newest checkpoint.
        All others are Trainer's own.

    Logged with every training record, over all ranks and micro-batches since the last one:
        loss                 sum(w * nll) / N, or the mean over turns
        ce_loss              sum(nll) / N, what SFT would report
        train/avg_p_correct  sum(p) / N
        train/dft_alpha      the alpha in force
        train/stage          the number of the stage, from 1; if there are any
        token_accuracy       share of supervised tokens whose arg-max is right
        mean_weight          sum(w) / N
        p_below_0.01, p_above_0.99   shares of supervised tokens
        entropy              mean over supervised tokens, in nats; if it is asked for
        ratio_clipped        share of the ratios to the starting weights; with the objectives that clip them
        channel/NAME/ce_loss, channel/NAME/p_correct, channel/NAME/acc   of one source
        tokens_per_second, supervised_tokens_per_second, memory_gib
        padding_share        of the positions that the model computed
        train/nonfinite_steps   steps whose update was skipped, see dft.nonfinite; where there are any or may be
        mfu                  share of the devices' peak, see dft.metrics.throughput; where the peak is known
    At its end: train_steps, train_tokens, train_supervised_tokens, and both per second of training alone.
    Evaluation: loss, ce_loss, perplexity, avg_p_correct, acc, mean_weight, the shares, entropy and channels of the
    whole set, behind the metric prefix; with answers, their scores, see dft.answers.asking.answer_metrics.
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
        loss: LossConfig | None = None,
        metrics: MetricsConfig | None = None,
        token_weight: Callable[[TokenStatistics], torch.Tensor] | None = None,
        plain_tokens: Sequence[int] = (),
        source_of_row: Callable[[int], str] | None = None,
        channels: Sequence[str] = (),
        row_lengths: Sequence[int] | None = None,
        **kwargs,
    ):
        loss = override(loss or LossConfig(), kwargs)
        metrics = override(metrics or MetricsConfig(), kwargs)
        if token_weight is not None and loss.objective != "dft":
            raise ValueError(f"give either token_weight or objective {loss.objective!r}, not both")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("DFTTrainer computes the loss itself: drop compute_loss_func")
        super().__init__(model, args, **kwargs)
        size = sequence_parallel_size(self.args)
        self._sequence = SequenceGroup(size, self.model.config) if size > 1 else None
        self.loss_config, self.metrics_config = loss, metrics
        self._refuse_what_changes_the_loss()
        keep_products_exact(self.model)
        self._warn_if_loss_selects_best()
        if self.args.torch_compile:
            compile_layers(self.model, self.accelerator, self.args)
        if loss.dft_special_tokens == "ce":
            if self.processing_class is None:
                raise ValueError("dft_special_tokens ce needs the tokenizer: give it as processing_class")
            plain_tokens = (*plain_tokens, *special_token_ids(self.processing_class))
        objective = make_objective(loss) if token_weight is None else token_weight
        self.objective_name = loss.objective if token_weight is None else "custom"
        self.token_weight = TokenWeight(loss.alpha, loss.dft_floor, tuple(plain_tokens), objective)
        weight = "from token_weight" if token_weight is not None else loss.formula
        logger.info("Loss: objective %s, weight %s, alpha %g", self.objective_name, weight, loss.alpha)
        chunk_mb = loss.loss_chunk_mb or CHUNK_MB.get(self.args.device.type, CHUNK_MB["cpu"])
        needs = self.token_weight.needs | Needs(entropy=metrics.log_entropy)
        self.scorer = Scorer(self.model, loss.fused_loss, chunk_mb, needs)
        if needs.reference:
            self.add_reference_column(loss.reference_cache_dir)
        self._temperature = Temperature(objective.tau) if isinstance(objective, Talr) else None
        self.stop = StopRequest()
        self.add_callback(self.stop)
        self._finite_check = FiniteCheck(self.train_dataset, source_of_row, self.stop, self.nonfinite)
        self._leak_check = LeakCheck(self.model.config.get_text_config().vocab_size)
        self._row_lengths = row_lengths
        self._order: EpochOrder | None = None  # of the training rows
        self.add_callback(SetEpochCallback(lambda: self._order))
        self.add_callback(LogLastStepCallback())
        self.channels = list(channels)
        # the count of supervised tokens is taken in get_batch_samples, whatever the model's signature
        self.model_accepts_loss_kwargs = False
        self._needs_no_logits = False  # in this step of the evaluation
        self._num_batches = 1  # micro-batches of this step
        self._eval_sums = TokenSums(self.args.device, len(self.channels))
        peak = metrics.peak_tflops
        self._peak_tflops = known_peak_tflops(self.args.device) if peak is None else peak
        self._flops = None if self._peak_tflops is None else model_flops(self.model)  # before the model is wrapped
        self._train_metrics = self._new_metrics()

    def _refuse_what_changes_the_loss(self) -> None:
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        if parallelism is not None and (parallelism.sp_size > 1 or parallelism.cp_size > 1 or parallelism.tp_size > 1):
            raise ValueError(
                "DFTTrainer does not support context or tensor parallelism; for sequence parallelism, drop "
                "parallelism_config and give sequence_parallel_size"
            )
        if self.args.label_smoothing_factor:
            raise ValueError("label_smoothing_factor has no meaning for the DFT loss: set it to 0")
        if self.args.n_gpu > 1:
            raise ValueError("DataParallel is not supported: start one process per GPU (torchrun, deepspeed)")

    def _warn_if_loss_selects_best(self) -> None:
        metric = self.args.metric_for_best_model
        if metric is not None and metric.removeprefix("eval_") == "loss" and self.loss_config.alpha > 0:
            logger.warning(
                "metric_for_best_model is %s: the DFT loss also falls where correct tokens become very unlikely, and "
                "doesn't tell which checkpoint is best; eval_ce_loss and eval_acc do",
                metric,
            )

    @property
    def _clips_ratios(self) -> bool:
        """Whether the objective clips ratios to the starting weights."""
        return hasattr(self.token_weight.objective, "is_clipped")

    def _new_metrics(self) -> TrainingMetrics:
        return TrainingMetrics(
            self.args.device,
            channels=self.channels,
            with_entropy=self.metrics_config.log_entropy,
            with_ratio=self._clips_ratios,
            objective=self.objective_name,
            min_steps=self.metrics_config.log_metrics_steps,
            flops=self._flops,
            peak_tflops=self._peak_tflops,
        )

    def _inner_training_loop(self, *args, **kwargs):
        """Trainer's; metrics start anew, also where auto_find_batch_size tries again."""
        self._train_metrics = self._new_metrics()
        if self._temperature is not None and kwargs.get("resume_from_checkpoint"):
            self._temperature.load(Path(kwargs["resume_from_checkpoint"]))
        return super()._inner_training_loop(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """Trainer's; its time is not counted as training."""
        with self._train_metrics.not_training():
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        """Trainer drops the columns that the model's forward doesn't take; the loss and the collators take more."""
        super()._set_signature_columns_if_needed()
        more = {"loss_weights", REFERENCE_COLUMN, DOCUMENTS, *(["channel"] if self.channels else [])}
        self._signature_columns += more - set(self._signature_columns)

    # ---- the loss -------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one step, and the supervised tokens (or turns) of all ranks to divide by."""
        self._train_metrics.start(self.state.global_step)
        if self._temperature is not None:
            self._temperature.update(self.accelerator)
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [count_terms(batch["labels"], self.loss_config.loss_normalization) for batch in batches]
        count = torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.int64)
        self._num_batches = len(batches)
        self._finite_check.begin(len(batches))
        count = self.accelerator.reduce(count.to(device), reduction="sum")
        return batches, count // sequence_parallel_size(self.args)  # ranks of a group have the same batches

    def alpha_at(self, step: int) -> float:
        """The alpha of a step, counted from 0."""
        warmup_steps = self.loss_config.dft_alpha_warmup_ratio * self.state.max_steps
        return self.token_weight.alpha * (1.0 if step >= warmup_steps else step / warmup_steps)

    def _weight_now(self, is_training: bool) -> TokenWeight:
        """The weight in force: alpha may rise in a training, and the temperature of talr follows the rows."""
        objective = self.token_weight.objective
        if self._temperature is not None:
            objective = replace(objective, tau=self._temperature.tau)
        alpha = self.alpha_at(self.state.global_step) if is_training else self.token_weight.alpha
        return replace(self.token_weight, alpha=alpha, objective=objective)

    def save_more(self, checkpoint: Path) -> None:
        """Writes the temperature of talr."""
        if self._temperature is not None:
            self._temperature.update(self.accelerator)
            if self.args.should_save:
                self._temperature.save(checkpoint)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """sum(c * w * nll) of this micro-batch over the supervised tokens (or turns) of the global batch, a scalar.

        c is the weight of a token in the data, w that of the DFT loss. In training the result is multiplied by the
        number of ranks, over which DDP, FSDP and ZeRO average gradients; the count is already that of all ranks.
        """
        self.refuse_unwrapped(model)
        whole = Batch.of(inputs)
        self._leak_check(model, whole.inputs)
        batch = whole if self._sequence is None else self._sequence.part_of(whole)
        is_training = self.model.training  # DeepSpeed's engine says so of itself in evaluations too
        token_weight = self._weight_now(is_training)
        normalization = self.loss_config.loss_normalization
        needs_logits = return_outputs and not self._needs_no_logits
        if needs_logits and self._sequence is not None:
            raise ValueError("no rank has the logits of whole rows: set prediction_loss_only, or drop compute_metrics")
        loss_sum, tokens, outputs = self.scorer.score(
            model, batch.inputs, batch.labels, token_weight, batch.token_data(normalization), needs_logits
        )
        if self._sequence is not None:
            self._sequence.check_attended()

        num_terms = batch.count_terms(normalization)
        sums = self._train_metrics.sums if is_training else self._eval_sums
        channel = batch.channel_of(tokens) if self.channels else None
        is_clipped = token_weight.objective.is_clipped(tokens) if self._clips_ratios else None
        sums.add(loss_sum, num_terms, tokens, is_clipped, batch.lengths, batch.num_positions, channel)

        # in evaluation there is no count: its metrics come from the sums
        loss = loss_sum / (num_terms if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        if is_training:
            loss = loss * self.accelerator.num_processes + self._router_loss(outputs, loss.device)
            if self._temperature is not None:
                group = None if self._sequence is None else self._sequence.group
                self._temperature.add(tokens, batch.document_of(tokens), len(whole.lengths), group)
            loss = self._finite_check.note(loss, whole.inputs, self.state.global_step + 1)
            if TRAINER_DIVIDES_LOSS:
                loss = loss * self._num_batches
        return (loss, outputs) if return_outputs else loss

    def _router_loss(self, outputs, device: torch.device) -> torch.Tensor | float:
        """The load-balancing loss of mixture-of-experts models, its mean over the step's micro-batches; else 0."""
        aux_loss = getattr(outputs, "aux_loss", None)
        if aux_loss is None:
            return 0.0
        config = self.model.config.get_text_config()
        coefficient = config.router_aux_loss_coef if hasattr(config, "router_aux_loss_coef") else config.aux_loss_coef
        return coefficient * aux_loss.to(device) / self._num_batches

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
            logs.update(self.stage_record(step))
        elif "train_runtime" in logs:
            logs.update(self._train_metrics.totals(self.accelerator, self.state.global_step))
        super().log(logs, start_time)

    # ---- rows -----------------------------------------------------------------------------------

    def _get_dataloader(self, dataset, description, batch_size, sampler_fn=None, *args, **kwargs):
        """Trainer's; training and evaluation sets are filled up so that no rank repeats a row to keep up.

        An evaluation is filled up in one process too where incomplete batches are dropped: it is of the whole set.
        """
        drops_last = self.args.dataloader_drop_last
        fills = description == "Evaluation" or (description == "Training" and not drops_last)
        if fills and (self.args.world_size > 1 or drops_last) and FilledRows.can_fill(dataset):
            dataset = FilledRows(dataset, batch_size * num_batches_at_once(self.args))
        if self._sequence is not None:
            sampler_fn = partial(RepeatedBatches, sampler_fn, batch_size, self._sequence.size)
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, *args, **kwargs)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Rows, or packed rows, of a step."""
        return self._train_batch_size * args.gradient_accumulation_steps * num_batches_at_once(args)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """The order of the training rows, see EpochOrder."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.stages is not None:
            return self.staged_order(dataset)
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
            rows_per_step=self.get_total_train_batch_size(args),
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
            metrics = (
                averages(sums)
                | health(sums, self.metrics_config.log_entropy, self._clips_ratios)
                | channel_averages(sums, self.channels)
            )
            metrics["perplexity"] = math.exp(min(metrics["ce_loss"], 700.0))
            output.metrics.update({f"{metric_key_prefix}_{key}": value for key, value in metrics.items()})
        if isinstance(dataloader.dataset, FilledRows):
            output = output._replace(num_samples=len(dataloader.dataset.rows))
        return output
