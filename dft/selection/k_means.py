"""K-means in float32, a block of rows at a time.

Shapes: N rows, H dimensions, K clusters, B rows of a block.
"""

import numpy as np
import torch
from torch import Tensor

ROUNDS = 50  # at most
ROWS_AT_ONCE = 8192


def k_means(embeddings: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """The cluster of each row, int64 [N], after Lloyd's rounds from centers that k-means++ draws.

    A cluster may be empty where rows are equal.

    Args:
        embeddings: finite, [N, H]; taken as float32.
        num_clusters: K; at most N are used.
        seed: of the first centers.
    """
    rows = torch.as_tensor(embeddings).float()
    rows = rows - rows.mean(0)
    centers = _first_centers(rows, min(num_clusters, len(rows)), np.random.default_rng(seed))
    cluster = torch.full((len(rows),), -1)
    for _ in range(ROUNDS):
        found = torch.cat([_nearest(block, centers) for block in rows.split(ROWS_AT_ONCE)])
        if torch.equal(found, cluster):
            break
        cluster = found
        counts = cluster.bincount(minlength=len(centers))
        sums = torch.zeros_like(centers).index_add_(0, cluster, rows)
        centers = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centers)
    return cluster.numpy()


def _first_centers(rows: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """Rows drawn by their squared distance to those drawn before, [K, H]."""
    chosen = [int(rng.integers(len(rows)))]
    distance = np.full(len(rows), np.inf)
    while len(chosen) < count:
        gap = torch.cat([(block - rows[chosen[-1]]).square().sum(1) for block in rows.split(ROWS_AT_ONCE)])
        distance = np.minimum(distance, gap.double().numpy())
        if not distance.any():
            break  # all others are copies of those
        chosen.append(int(rng.choice(len(rows), p=distance / distance.sum())))
    return rows[chosen]


def _nearest(block: Tensor, centers: Tensor) -> Tensor:
    """The nearest center of each row, int64 [B]; the squared norms of the rows change nothing."""
    return (centers.square().sum(1) - 2 * (block @ centers.T)).argmin(1)
