"""Published times of attention on trn2, by other people: what the cost model is fitted on and checked with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from neuron_attn_rewrite.masks.spec import Band, MaskSpec
from neuron_attn_rewrite.problem import AttentionProblem

NKILIB = "nki-library, test_attention_cte.py"
HF_KERNELS = "hf-kernels-neuron, results/raw/attn-sweep"
XPU_PERF = "xpu-perf, NEURON README"
XPU_PERF_QWEN = "xpu-perf, README of the Qwen 3.5 27B workloads"
JIMBURTOFT = "jimburtoft/nki-library"


@dataclass(frozen=True)
class Point:
    """One published time."""

    source: str
    cores: int
    heads: int
    q_len: int
    kv_len: int
    head_dim: int
    mask: str
    """"full", "causal", the number of keys of a causal window, or "prior N": causal behind N keys that all rows see."""
    micros: float
    kv_heads: int = 0

    @property
    def problem(self) -> AttentionProblem:
        """What was measured."""
        kind, _, prior = self.mask.partition(" ")
        band = {"full": (), "causal": (Band(upper=0),), "prior": (Band(upper=int(prior or 0)),)}.get(kind)
        if band is None:
            band = (Band(1 - int(self.mask), 0),)
        return AttentionProblem(
            batch=1,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads or self.heads,
            q_len=self.q_len,
            kv_len=self.kv_len,
            head_dim=self.head_dim,
            v_head_dim=self.head_dim,
            dtype=torch.bfloat16,
            scale=1.0,
            mask=MaskSpec(band),
        )

    def __str__(self) -> str:
        heads = f"{self.heads} / {self.kv_heads}" if self.kv_heads else str(self.heads)
        return f"LNC {self.cores}, {heads} x {self.q_len} x {self.kv_len} x {self.head_dim}, {self.mask}"


def _points(
    source: str, cores: int, *rows: tuple[int, int, int, int, str, float] | tuple[int, int, int, int, str, float, int]
) -> tuple[Point, ...]:
    return tuple(Point(source, cores, *row) for row in rows)


KERNEL = (
    *_points(
        NKILIB,
        2,
        (1, 8192, 8192, 64, "full", 520),
        (1, 4096, 8192, 64, "full", 296),
        (1, 8192, 4096, 64, "full", 313),
        (1, 32768, 8192, 64, "full", 1870),
        (1, 8192, 8192, 64, "causal", 343),
        (1, 8192, 8192, 128, "causal", 352),
        (3, 8192, 8192, 128, "causal", 903),
        (3, 8192, 8192, 128, "full", 1490),
        (1, 32768, 32768, 64, "causal", 4270),
        (4, 2048, 8192, 64, "full", 560),
        (3, 1024, 2048, 128, "full", 115),
        (2, 16384, 16384, 128, "causal", 2110),
        (2, 1024, 1024, 128, "causal", 71),
        (2, 512, 512, 128, "causal", 55),
        (1, 1024, 1024, 128, "causal", 59),
        (1, 256, 256, 128, "causal", 43),
        (1, 512, 512, 128, "causal", 52),
        (2, 1024, 1024, 64, "causal", 69),
        (2, 577, 577, 88, "full", 56),
        (2, 729, 729, 128, "causal", 60),
        (3, 729, 729, 128, "causal", 82),
        (3, 8192, 8192, 64, "causal", 900),
        (1, 10240, 10240, 64, "causal", 495),
        (3, 8192, 8192, 64, "full", 1450),
        (1, 8192, 8192, 64, "128", 135),
        (8, 10240, 10240, 64, "causal", 3360),
        (8, 10240, 10240, 64, "128", 894),
        (2, 2048, 2048, 64, "causal", 103),
        (2, 2048, 2048, 64, "128", 78),
        (2, 4096, 4096, 64, "causal", 211),
        (2, 4096, 4096, 64, "128", 125),
        (2, 8192, 8192, 64, "causal", 596),
        (2, 8192, 8192, 64, "128", 211),
        (2, 16384, 16384, 64, "causal", 2110),
        (2, 16384, 16384, 64, "128", 583),
        (2, 32768, 32768, 64, "128", 1560),
        # One rank of a context parallel group: contiguous rows skip nothing.
        (4, 512, 1024, 128, "full", 77),
        (4, 512, 4096, 128, "full", 147),
        (10, 512, 8192, 128, "full", 530),
        (10, 640, 10240, 128, "full", 725),
        (10, 1024, 16384, 128, "full", 1550),
        (10, 2048, 32768, 128, "full", 5270),
        (3, 512, 8192, 128, "full", 233),
        (4, 640, 10240, 64, "full", 306),
        # Heads that share keys, and a prefix.
        (9, 2048, 2048, 128, "causal", 332, 3),
        (8, 10240, 10240, 64, "causal", 3440, 1),
        (8, 10240, 10240, 64, "128", 963, 1),
        (8, 16384, 16384, 64, "128", 2240, 1),
        (8, 16384, 16384, 64, "causal", 8560, 4),
        (2, 2048, 3072, 128, "prior 1024", 125, 1),
        (5, 2048, 3072, 128, "prior 1024", 259, 1),
        (9, 2048, 3072, 128, "prior 1024", 431, 3),
        (8, 4096, 6144, 64, "prior 2048", 1180, 1),
        (8, 8192, 12288, 64, "prior 4096", 4480, 1),
    ),
    *_points(
        NKILIB,
        1,
        (3, 1024, 2048, 128, "full", 155),
        (9, 2048, 3072, 128, "prior 1024", 777, 3),
        (3, 12345, 12345, 127, "128", 1400, 1),
    ),
    *_points(
        HF_KERNELS,
        1,
        (16, 512, 512, 128, "causal", 246),
        (16, 1024, 1024, 128, "causal", 494),
        (16, 2048, 2048, 128, "causal", 1144),
        (16, 3072, 3072, 128, "causal", 1848),
        (16, 4096, 4096, 128, "causal", 2830),
    ),
    *_points(XPU_PERF, 2, (80, 4096, 4096, 128, "causal", 7407)),
    *_points(XPU_PERF, 1, (80, 4096, 4096, 128, "causal", 13688)),
    *_points(JIMBURTOFT, 2, (1, 32768, 32768, 128, "full", 8630)),
)
"""Times of attention_cte. The first source gives picoseconds in its test parameters."""

NATIVE = (
    *_points(
        HF_KERNELS,
        2,
        (16, 512, 512, 128, "causal", 123),
        (16, 1024, 1024, 128, "causal", 427),
        (16, 2048, 2048, 128, "causal", 1690),
        (16, 3072, 3072, 128, "causal", 3906),
        # Published as 1578: see `fit_cost.page`.
        (16, 4096, 4096, 128, "causal", 6334),
    ),
    *_points(XPU_PERF, 2, (80, 4096, 4096, 128, "causal", 60500, 8)),
    *_points(
        XPU_PERF_QWEN,
        2,
        (24, 4096, 4096, 256, "causal", 13700, 4),
        (6, 4096, 4096, 256, "causal", 3500, 1),
        (24, 10240, 10240, 256, "causal", 282000, 4),
        (6, 10240, 10240, 256, "causal", 70500, 1),
    ),
)
"""Times of the compiled native operators; plain torch is spread over both cores of a logical one. Those of head_dim 256
are of scaled_dot_product_attention, which has no kernel there."""
