"""The report as plain data. It makes no decisions: every sentence in it is a `Reason` of an earlier step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy
from neuron_attn_rewrite.graph.nodes import PERMUTES
from neuron_attn_rewrite.masks.spec import MaskSpec, Unproven
from neuron_attn_rewrite.reasons import Reason


@dataclass(frozen=True)
class NodeReport:
    """One node of the graph before or after."""

    name: str
    call: str
    """The call as Python source, such as `torch.ops.aten.softmax.int(add, -1)`; "" for an input or a weight."""
    inputs: tuple[str, ...] = ()
    """Names of the nodes that it reads."""
    shape: tuple[int | str, ...] | None = None
    """None where the result is not one tensor."""
    dtype: torch.dtype | None = None
    role: str = "kept"
    """The role of the node in its attention. A node of the attention is "kept", "added", "removed", or "mask" (removed,
    and only used to make a mask). A node that it reads is "query", "key", "value", or "operand" for anything else."""

    @property
    def is_operand(self) -> bool:
        return self.role in ("query", "key", "value", "operand")

    @property
    def is_transpose(self) -> bool:
        """Whether it only permutes axes."""
        return any(part in PERMUTES for part in self.op.split("."))

    @property
    def op(self) -> str:
        """The operator, such as `aten.softmax.int`; "" for an input or a weight."""
        return self.call.partition("(")[0].removeprefix("torch.ops.")


@dataclass(frozen=True)
class SiteReport:
    """One attention, before and after. Sizes are None where the attention was not understood."""

    name: str
    """Path of the module that computes it."""
    pattern: str
    """How it was written."""
    source: str = ""
    """The line of the model's own code, such as `transformers/models/llama/modeling_llama.py:205`; "" if unknown."""
    source_code: str = ""
    """The text of that line."""
    batch: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    q_len: int | None = None
    kv_len: int | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    dtype: torch.dtype | None = None
    scale: float | None = None
    softcap: float | None = None
    sink: bool = False
    bias: tuple[int, ...] | None = None
    """Shape of the dense additive operand."""
    mask: MaskSpec | Unproven | None = None
    strategy: FlashAttentionStrategy = FlashAttentionStrategy.NONE
    kernel: str = "native"
    gradients: str | None = None
    """What computes the gradients of a replaced attention: a kernel of the SDK, or "operators"; None if no
    gradients are needed."""
    reasons: tuple[Reason, ...] = ()
    """The reasons of all rules that applied, in order."""
    before: tuple[NodeReport, ...] = ()
    """The attention as it was, with what it reads, in the order of the graph."""
    after: tuple[NodeReport, ...] = ()
    """What took its place, with what that reads; empty where nothing did."""
    max_error: float | None = None
    """Largest difference on the example and on all drawn inputs, relative to the largest magnitude; None if there was
    nothing to run."""
    draws: int = 0
    """On how many drawn inputs the kernel and the original were compared, besides the example inputs."""
    traceback: str = ""
    """Where the analysis failed, if the reason is `internal-error`. Empty otherwise."""

    @property
    def is_replaced(self) -> bool:
        return bool(self.after)

    @property
    def removed_nodes(self) -> tuple[str, ...]:
        """Names of the nodes that were removed. A node that several sites shared belongs to the first."""
        return tuple(n.name for n in self.before if n.role in ("removed", "mask"))

    @property
    def added_nodes(self) -> tuple[str, ...]:
        """Names of the nodes that were added."""
        return tuple(n.name for n in self.after if n.role == "added")

    @property
    def transposes_saved(self) -> int:
        """How many fewer nodes permute axes than before, because the kernel takes the data in its present layout."""
        before = sum(n.is_transpose for n in self.before if n.role in ("removed", "mask"))
        return before - sum(n.is_transpose for n in self.after if n.role == "added")

    @property
    def score_bytes(self) -> int:
        """Bytes of the scores, [batch, num_heads, q_len, kv_len], which a kernel never stores. 0 if not known."""
        sizes = (self.batch, self.num_heads, self.q_len, self.kv_len)
        if self.dtype is None or not all(isinstance(size, int) for size in sizes):
            return 0
        return math.prod(sizes) * self.dtype.itemsize  # type: ignore[arg-type]

    @property
    def flops(self) -> int:
        """Multiplications and additions of both matrix products, including those of hidden keys."""
        if not self.score_bytes:
            return 0
        pairs = self.score_bytes // self.dtype.itemsize  # type: ignore[union-attr]
        return 2 * pairs * (self.head_dim + self.v_head_dim)  # type: ignore[operator]

    @property
    def visible(self) -> float:
        """The fraction of query-key pairs, from 0 to 1, that the proven mask leaves visible. Padding does not count."""
        if not isinstance(self.mask, MaskSpec) or not self.score_bytes:
            return 1.0
        assert self.q_len and self.kv_len
        first, end = self.mask.rows(self.q_len, self.kv_len).unbind(1)
        return float((end - first).sum()) / (self.q_len * self.kv_len)


@dataclass(frozen=True)
class ReportData:
    """Every attention of a model, and what became of it."""

    sites: tuple[SiteReport, ...]
    target: str
    lnc: int
    policy: str
    nodes_before: int
    nodes_after: int
    unused_inputs: tuple[str, ...] = ()
    """Tensor inputs that the captured graph does not read: whatever is passed there changes nothing."""
    made_with: str = ""
    """Versions of this package and of torch."""
    capture_error: float | None = None
    """How far the captured graph, before anything was replaced, is from the model on the example inputs, relative to
    the largest magnitude of each output. None where they were not compared: see `capture.compare`."""

    @property
    def replaced(self) -> tuple[SiteReport, ...]:
        return tuple(site for site in self.sites if site.is_replaced)

    @property
    def kept(self) -> tuple[SiteReport, ...]:
        return tuple(site for site in self.sites if not site.is_replaced)

    @property
    def score_bytes_saved(self) -> int:
        """Bytes of the score matrices of all replaced attentions, which are no longer stored."""
        return sum(site.score_bytes for site in self.replaced)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a caller should check even if the outputs look right, one sentence each."""
        back = tuple(f"{s.name} stays native, {r}" for s in self.kept for r in s.reasons if r.code == "put-back")
        unused = tuple(
            f"the captured graph does not read its input {name}, so its value changes nothing. "
            "If it matters, capture with an example that uses it, such as a padded attention_mask."
            for name in self.unused_inputs
        )
        return back + unused
