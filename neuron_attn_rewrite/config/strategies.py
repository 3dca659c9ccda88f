"""The strategies: how one attention runs."""

from __future__ import annotations

from enum import Enum


class FlashAttentionStrategy(Enum):
    """How an attention runs. Names and numbers are those of NxD Inference 2.26."""

    NONE = 0
    """The native operators, left as they were."""
    UNSHARDED_KERNEL = 1
    """One kernel on one physical NeuronCore (LNC 1)."""
    SHARDED_KERNEL = 2
    """One kernel over the two physical cores of a logical NeuronCore (LNC 2)."""
    CONTEXT_PARALLEL_KERNEL = 3
    """The query rows are split over ranks in contiguous pieces."""
    STRIDED_CONTEXT_PARALLEL_KERNEL = 4
    """The query rows are split over ranks in strides, so that causal work is even."""
    SLIDING_WINDOW_KERNEL = 5
    """A kernel that reads only the keys of a causal window."""
