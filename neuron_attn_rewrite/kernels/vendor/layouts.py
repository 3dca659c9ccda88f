"""Steps that adapters share: folding heads, scaling, padding, and naming a mask as the SDK does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from neuron_attn_rewrite.kernels.reference import Terms


def folded(tensor: Tensor) -> Tensor:
    """[batch, heads, length, dim] to [batch * heads, length, dim]."""
    return tensor.reshape(-1, *tensor.shape[2:])


def scaled(query: Tensor, scale: float) -> Tensor:
    """The query times the scale, in its dtype: for kernels that take no scale."""
    return query if scale == 1.0 else query * scale


def column(sink: Tensor | None, batch: int) -> Tensor | None:
    """The sinks of nkilib's kernels: float32 [batch * heads, 1]."""
    return None if sink is None else sink.float().repeat(batch)[:, None]


def repeated(tensor: Tensor, heads: int) -> Tensor:
    """Key or value with one head for each query head."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], 1)


def padded(tensor: Tensor, dim: int, size: int, fill: float = 0.0) -> Tensor:
    """`tensor` with `dim` grown to `size`."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    return pad(tensor, [0, 0] * (tensor.dim() - 1 - dim % tensor.dim()) + [0, missing], value=fill)


def multiple(length: int, of: int) -> int:
    """`length`, rounded up."""
    return -(-length // of) * of


@dataclass(frozen=True)
class Mask:
    """A mask of band and bounds, as SDK kernels name it."""

    kind: str
    """"full", "causal" (aligned at the top left), "prior" (causal behind `offset` keys that all rows see) or "rows"
    (one interval of keys for each row)."""
    window: int | None = None
    """Keys that a row sees, its own among them; None for all."""
    offset: int = 0


def mask_of(lower: int | None, upper: int | None, by_rows: bool, q_len: int, kv_len: int) -> Mask:
    """The cheapest kind that is exact. A side of the band that hides no key counts as open."""
    if upper is not None and upper >= kv_len - 1:
        upper = None
    if lower is not None and lower <= 1 - q_len:
        lower = None
    if by_rows or (upper is None and lower is not None):
        return Mask("rows")
    if upper is None:
        return Mask("full")
    window = None if lower is None else upper - lower + 1
    if window is not None and window < 1:
        return Mask("rows")
    if upper == 0:
        return Mask("causal", window)
    # Below 0 there are empty rows; past the last key, rows without a key of their own.
    return Mask("prior", window, upper) if 0 < upper <= kv_len - q_len else Mask("rows")


def mask_in(terms: Terms, q_len: int, kv_len: int) -> Mask:
    """`mask_of` the arguments of the op, without key padding."""
    return mask_of(terms.band_lower, terms.band_upper, terms.bounds is not None, q_len, kv_len)


def row_bounds(terms: Terms, q_len: int, kv_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First key and end of the keys that each row sees, int64 [batch | 1, q_len] each, from band and bounds."""
    i = torch.arange(q_len, device=device)[None]
    first, end = torch.zeros_like(i), torch.full_like(i, kv_len)
    if terms.band_lower is not None:
        first = first.maximum(i + terms.band_lower)
    if terms.band_upper is not None:
        end = end.minimum(i + terms.band_upper + 1)
    if terms.bounds is not None:
        first, end = first.maximum(terms.bounds[..., 0]), end.minimum(terms.bounds[..., 1])
    return first, end
