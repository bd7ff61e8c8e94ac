"""One row of attention in place of the visual block, for the loss of CompoDistill's released code. An approximation.

That loss drops attention sinks on both sides, teacher's and student's, from the block of visual queries and visual
keys before it averages over the queries. A vector of the teacher alone cannot know what the student's side drops, so
training on it is close to the released loss, not equal to it; equal needs `rows="visual"`, a hundred times the bytes.
"""

from __future__ import annotations

import numpy as np


def pool_visual(attention_GVV: np.ndarray) -> np.ndarray:
    """The teacher's visual block as one row a group.

    Args:
        attention_GVV: (G, V, V) slices of the visual queries.

    Returns:
        (G, 1, V) float32: of each column the mean of the entries not above the block's mean + standard deviation.
    """
    limit_G11 = attention_GVV.mean((1, 2), keepdims=True, dtype=np.float64)
    limit_G11 = limit_G11 + attention_GVV.std((1, 2), keepdims=True, dtype=np.float64)
    kept = attention_GVV <= limit_G11
    sums_G1V = np.where(kept, attention_GVV, 0).sum(1, keepdims=True, dtype=np.float64)
    return (sums_G1V / np.maximum(kept.sum(1, keepdims=True), 1)).astype(np.float32)
