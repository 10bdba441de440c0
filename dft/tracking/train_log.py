"""Write every log record of a run to train_log.jsonl, one JSON object per line."""

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dft.files import dispensable


class TrainLog(TrainerCallback):
    """Writes every log record to train_log.jsonl in the output directory: the step and the numbers logged at it."""

    def __init__(self, output_dir: str):
        self.path = Path(output_dir) / "train_log.jsonl"

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts the file anew on rank 0, with the records that a resumed run's checkpoint holds."""
        if state.is_world_process_zero:
            earlier = state.log_history if state.global_step else []
            with dispensable(self.path):
                self.path.write_text("".join(map(self._line, earlier)), encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Appends the record on rank 0; NaN and infinity become null."""
        if state.is_world_process_zero:
            with dispensable(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(self._line({**(logs or {}), "step": state.global_step}))

    @staticmethod
    def _line(record: dict[str, Any]) -> str:
        # JSON has neither NaN nor infinity
        numbers = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        return json.dumps({"step": record["step"]} | numbers) + "\n"
