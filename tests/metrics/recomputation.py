"""The metrics by their definitions: one row at a time, one token at a time, in float64."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch


def recomputed(model, rows: Iterable[dict], alpha: float, channels: tuple[str, ...] = ()) -> dict[str, float]:
    """The metrics of the model on the rows; of each channel too, which a row's `channel` numbers."""
    sums, of_channel, count = defaultdict(float), defaultdict(lambda: [0.0, 0.0, 0, 0]), 0
    model = model.eval()
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), row["labels"]
        with torch.no_grad():
            log_p = torch.log_softmax(model(ids).logits[0].double(), dim=-1)
        for t in range(len(labels) - 1):
            if labels[t + 1] == -100:
                continue
            nll = -float(log_p[t, labels[t + 1]])
            p = math.exp(-nll)
            sums["loss"] += (alpha * p + 1 - alpha) * nll
            sums["ce_loss"] += nll
            sums["avg_p_correct"] += p
            sums["acc"] += int(log_p[t].argmax()) == labels[t + 1]
            sums["mean_weight"] += alpha * p + 1 - alpha
            sums["p_below_0.01"] += p < 0.01
            sums["p_above_0.99"] += p > 0.99
            sums["entropy"] += -float((log_p[t].exp() * log_p[t]).sum())
            count += 1
            if channels:
                some = of_channel[channels[row["channel"]]]
                for i, value in enumerate((nll, p, int(log_p[t].argmax()) == labels[t + 1], 1)):
                    some[i] += value
    metrics = {name: value / count for name, value in sums.items()}
    for name, (nll, p, correct, n) in of_channel.items():
        own = {"ce_loss": nll / n, "p_correct": p / n, "acc": correct / n}
        metrics |= {f"channel/{name}/{key}": value for key, value in own.items()}
    return metrics
