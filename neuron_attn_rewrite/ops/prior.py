"""`neuron_attn::flash_prior`: new rows against a cache and their own keys, for token generation and prefix caching.

Query row i of batch element b is at position `prior_lengths[b] + i`. It sees the keys of the cache before
`prior_lengths[b]`, except those that `prior_mask` hides, and the new keys up to its own, except those that `new_mask`
hides. With a `window` it sees only the last `window` positions, including its own. A row that sees no key gives zeros.
The cache entries after `prior_lengths[b]` do not change the result, but they must be finite. scale, softcap, sink, lnc,
the dtypes and the result are those of `flash_fwd`.

In token generation the few rows of all heads of a group are one query tile, so that the cache is read once.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from neuron_attn_rewrite.errors import InputError
from neuron_attn_rewrite.kernels import cpu, reference, vendor
from neuron_attn_rewrite.kernels.nki import prepare, tiling
from neuron_attn_rewrite.kernels.nki.prepare import Launch
from neuron_attn_rewrite.kernels.nki.tiling import Intervals
from neuron_attn_rewrite.kernels.reference import Terms
from neuron_attn_rewrite.kernels.vendor.adapter import Adapter, TwoSources
from neuron_attn_rewrite.ops.arguments import FARTHEST, out_of_range

NAME = "flash_prior"


@dataclass(frozen=True, eq=False)
class FlashPrior:
    """The arguments of `flash_prior`, and what is computed of them."""

    query: Tensor
    """[batch, num_heads, q_len, head_dim], the new rows."""
    key: Tensor
    """[batch, num_kv_heads, q_len, head_dim], of the new rows."""
    value: Tensor
    """[batch, num_kv_heads, q_len, v_head_dim], of the new rows."""
    key_prior: Tensor
    """[batch, num_kv_heads, prior_capacity, head_dim], the cache."""
    value_prior: Tensor
    """[batch, num_kv_heads, prior_capacity, v_head_dim], the cache."""
    prior_lengths: Tensor
    """Int [1 | batch]: how many keys of the cache are used, at most all. Known only at run time. Checked on the CPU."""
    _: KW_ONLY
    scale: float
    window: int | None = None
    """Positions that a row sees, its own included, at least 1. None for all."""
    prior_mask: Tensor | None = None
    """Bool [1 | batch, prior_capacity], True where a key of the cache is seen."""
    new_mask: Tensor | None = None
    """Bool [1 | batch, q_len], True where a new key is seen."""
    softcap: float | None = None
    sink: Tensor | None = None
    """Float [num_heads]."""
    lnc: int = 1
    kernel_name: str = NAME
    """Ours, or a name in `kernels.vendor.BEHIND`. It changes no number."""

    def check(self) -> None:
        """Check what `arguments.checked_terms` does not.

        Raises:
            InputError: an argument does not fit; the message names it.
        """
        if self.kernel_name != NAME and self.kernel_name not in vendor.BEHIND:
            raise InputError(
                f"flash_prior: kernel_name must be one of {', '.join((NAME, *vendor.BEHIND))}, not "
                f"{self.kernel_name!r}."
            )
        query, key = self.query, self.key
        for name, prior, new in (
            ("key_prior", self.key_prior, key),
            ("value_prior", self.value_prior, self.value),
        ):
            wanted = (*new.shape[:2], new.shape[3])
            if prior.dim() != 4 or prior.dtype != new.dtype or (*prior.shape[:2], prior.shape[3]) != wanted:
                raise _error(name, f"must be [batch, num_kv_heads, prior_capacity, size] as {list(new.shape)}", prior)
        if key.shape[2] != query.shape[2]:
            raise _error("key", f"must have query's length {query.shape[2]}", key)
        batch, capacity = query.shape[0], self.key_prior.shape[2]
        if self.value_prior.shape[2] != capacity:
            raise _error("value_prior", f"must have key_prior's capacity {capacity}", self.value_prior)
        lengths = self.prior_lengths
        if lengths.dtype not in (torch.int32, torch.int64) or tuple(lengths.shape) not in ((1,), (batch,)):
            raise _error("prior_lengths", f"must be int [1 | {batch}]", lengths)
        for name, mask, keys in (
            ("prior_mask", self.prior_mask, capacity),
            ("new_mask", self.new_mask, query.shape[2]),
        ):
            if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) not in ((1, keys), (batch, keys))):
                raise _error(name, f"must be bool [1 | {batch}, {keys}]", mask)
        if self.window is not None and self.window < 1:
            raise InputError(f"flash_prior: window must be at least 1, not {self.window}.")

    def check_values(self) -> None:
        """Check the values of `prior_lengths`.

        Raises:
            InputError: a length is negative or beyond the capacity of the cache.
        """
        capacity = self.key_prior.shape[2]
        wrong = out_of_range(self.prior_lengths, 0, capacity + 1)
        if wrong is not None:
            raise InputError(
                f"flash_prior: prior_lengths must lie in [0, {capacity}], the capacity of the cache, and one is "
                f"{wrong}."
            )

    @property
    def nearest(self) -> int | None:
        """The window, but not larger than `FARTHEST`."""
        return None if self.window is None else min(self.window, FARTHEST)

    def on_cpu(self) -> Tensor:
        """The result on the CPU. The keys of both sources are read as they lie."""
        result = cpu.attention_to_parts(self.query, [self._prior(), self._new()], self.sink)
        return cpu.attention(*self.as_one()) if result is None else result

    def _prior(self) -> tuple[Tensor, Tensor, Terms]:
        """The keys of the cache that some row may see, their values, and what each row sees of them."""
        first, end = 0, int(self.prior_lengths.max())
        if self.nearest is not None:
            first = max(0, int(self.prior_lengths.min()) + 1 - self.nearest)
        first = min(first, end)
        seen = None if self.prior_mask is None else self.prior_mask[:, first:end]
        bounds = None
        if self.nearest is not None:
            prior, _ = self.intervals()
            bounds = torch.stack([prior.lo, prior.hi], 2) - first
        elif len(self.prior_lengths) > 1:
            counts = torch.arange(first, end) < self.prior_lengths[:, None]
            seen = counts if seen is None else counts & seen
        terms = Terms(self.scale, key_padding=seen, bounds=bounds, softcap=self.softcap)
        return self.key_prior[:, :, first:end], self.value_prior[:, :, first:end], terms

    def _new(self) -> tuple[Tensor, Tensor, Terms]:
        """The new keys, their values, and what each row sees of them."""
        lower = None if self.nearest is None else 1 - self.nearest
        return self.key, self.value, Terms(self.scale, lower, 0, key_padding=self.new_mask, softcap=self.softcap)

    def decomposed(self) -> Tensor:
        """The result by plain torch operators."""
        return reference.attention(*self.as_one())

    def as_one(self) -> tuple[Tensor, Tensor, Tensor, Terms]:
        """The same as one attention, whose keys are the cache and then the new ones: query, key, value and terms."""
        keys, values = torch.cat([self.key_prior, self.key], 2), torch.cat([self.value_prior, self.value], 2)
        return self.query, keys, values, self.terms()

    def by(self, adapter: Adapter) -> Tensor:
        """The result by a kernel of the SDK."""
        tensors = (self.query, self.key, self.value, self.key_prior, self.value_prior, self.prior_lengths)
        return adapter.attend_behind(TwoSources(*tensors, self.nearest, self.terms()), self.lnc)

    def terms(self) -> Terms:
        """What the rows see of the cache and then the new keys, as of one tensor."""
        q_len, capacity = self.query.shape[2], self.key_prior.shape[2]
        prior, new = self.intervals()
        lo = torch.where(prior.lo < prior.hi, prior.lo, new.lo + capacity)
        counts = torch.arange(capacity, device=self.query.device) < self.prior_lengths[:, None]
        if self.prior_mask is not None:
            counts = counts & self.prior_mask
        fresh = counts.new_ones(1, q_len) if self.new_mask is None else self.new_mask
        batch = max(len(counts), len(fresh))
        return Terms(
            self.scale,
            key_padding=torch.cat([counts.expand(batch, -1), fresh.expand(batch, -1)], 1),
            bounds=torch.stack([lo, (new.hi + capacity).expand_as(lo)], 2),
            softcap=self.softcap,
            sink=self.sink,
        )

    def launch(self, target: str = "gen3") -> Launch:
        """The launch of our NKI kernel: that of `flash_fwd`, with the cache as a second source of keys."""
        q_len, capacity = self.query.shape[2], self.key_prior.shape[2]
        prior, new = self.intervals()
        sources = [
            prepare.Source(
                "", self.key, self.value, new, _new_keys(q_len, self.nearest), exact=True, padding=self.new_mask
            ),
            prepare.Source(
                "_prior",
                self.key_prior,
                self.value_prior,
                prior,
                tiling.band(q_len, capacity, None, None),
                exact=False,
                padding=self.prior_mask,
            ),
        ]
        terms = Terms(self.scale, softcap=self.softcap, sink=self.sink)
        return prepare.launch(self.query, sources, terms, lnc=self.lnc, target=target)

    def intervals(self) -> tuple[Intervals, Intervals]:
        """What each row sees of the cache, and of the new keys."""
        q_len = self.query.shape[2]
        lengths = self.prior_lengths.to(torch.int32)[:, None]
        i = torch.arange(q_len, dtype=torch.int32, device=lengths.device)[None]
        first = torch.zeros_like(lengths + i) if self.nearest is None else lengths + i - (self.nearest - 1)
        prior = Intervals(first, lengths.expand_as(first)).within(self.key_prior.shape[2])
        return prior, _new_keys(q_len, self.nearest, lengths.device)


def _new_keys(q_len: int, window: int | None, device: torch.device | str = "cpu") -> Intervals:
    return tiling.band(q_len, q_len, None if window is None else 1 - window, 0, device)


def _error(name: str, rule: str, tensor: Tensor) -> InputError:
    return InputError(f"flash_prior: {name} {rule}, but it is {list(tensor.shape)}, {tensor.dtype}.")
