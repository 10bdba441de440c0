"""train_log.jsonl: every log record of a run as a line of JSON."""

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class TrainLog(TrainerCallback):
    """Writes every log record as a line of train_log.jsonl: the step and the numbers logged at it."""

    def __init__(self, output_dir: str):
        self.path = Path(output_dir) / "train_log.jsonl"

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            earlier = state.log_history if state.global_step else []  # a resumed run's checkpoint knows them
            self.path.write_text("".join(map(self._line, earlier)), encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Appends the record on rank 0; NaN and infinity become null."""
        if state.is_world_process_zero:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(self._line({**(logs or {}), "step": state.global_step}))

    @staticmethod
    def _line(record: dict[str, Any]) -> str:
        # JSON has no NaN
        numbers = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        return json.dumps({"step": record["step"]} | numbers) + "\n"
