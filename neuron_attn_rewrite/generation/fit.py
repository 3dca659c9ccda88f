"""The inputs of a text part, brought to the shapes of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.errors import InputError
from neuron_attn_rewrite.generation.step import Names


@dataclass(frozen=True)
class Window:
    """Which new tokens a graph processes, and how its inputs are filled up to their sizes."""

    begin: int
    end: int
    cached: int
    fill: tuple[int, int]
    """How many tokens are filled in before and behind."""
    keys: tuple[int, int] | None
    """How many keys are filled in before and behind. None if a mask of keys is one of the new tokens alone."""
    batch: int
    """How many sequences the graph processes. Missing ones are copies of the first."""

    def fit(self, inputs: Mapping[str, Any], names: Names) -> dict[str, Any]:
        """The inputs of a graph: of all new tokens, those of this window."""
        roles = {names.mask: self._mask, names.positions: self._positions}
        return {name: pytree.tree_map(roles.get(name, self._features), value) for name, value in inputs.items()}

    def _mask(self, mask: Tensor) -> Tensor:
        seen = mask[..., : self.cached + self.end]
        if mask.dim() == 2:
            length = sum(self.fill) + self.end - self.begin
            return self._whole(seen[:, -length:] if self.keys is None else pad(seen, self.keys))
        hidden = 0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        rows = pad(seen[..., self.begin : self.end, :], self.keys or (0, 0), hidden)
        # What is filled in sees something. A row that sees nothing could be NaN, and so would be what is cached of it.
        before, behind = (
            rows[..., i, None, :].repeat_interleave(n, -2) for i, n in zip((0, -1), self.fill, strict=True)
        )
        return self._whole(torch.cat([before, rows, behind], -2))

    def _positions(self, positions: Tensor) -> Tensor:
        return self._whole(pad(positions[..., self.begin : self.end], self.fill), -2)

    def _features(self, features: Tensor) -> Tensor:
        if features.dim() < 2:
            return features  # an index of all rows
        moved = features[:, self.begin : self.end].transpose(1, -1)
        return self._whole(pad(moved, self.fill).transpose(1, -1))

    def _whole(self, tensor: Tensor, dim: int = 0) -> Tensor:
        return whole_batch(tensor, self.batch, dim)


def whole_batch(tensor: Tensor, batch: int, dim: int = 0) -> Tensor:
    """As many rows as a graph takes. Missing ones are copies of the first."""
    missing = batch - tensor.shape[dim]
    return torch.cat([tensor, *[tensor.narrow(dim, 0, 1)] * missing], dim) if missing else tensor


def whole_numbers(name: str, tensor: Tensor) -> Tensor:
    """As int64, which the graphs take. `generate` of a model takes masks and tokens of other dtypes too.

    Raises:
        InputError: there are fractions.
    """
    whole = tensor.to(torch.int64)
    if tensor.is_floating_point() and not torch.equal(whole.to(tensor.dtype), tensor):
        raise InputError(f"generate: {name} must hold whole numbers, and it is {tensor.dtype} with fractions.")
    return whole


def pad(tensor: Tensor, fill: tuple[int, int], value: float = 0) -> Tensor:
    """A value before and behind the last dim."""
    return torch.nn.functional.pad(tensor, fill, value=value)


def has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)) or (
        isinstance(value, dict) and bool(value)
    )


def of_all_tokens(given: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Features that are given for some tokens become features of all, and zeros of the others.

    What selects those tokens becomes an index of all rows.
    """
    rows, count = given[names.tokens].shape[:2]
    found = dict(given)
    for selector, selected in given.items():
        if not isinstance(selected, Tensor) or selected.dtype != torch.bool or selected.shape != (rows, count):
            continue
        number = int(selected.sum())

        def spread(t: Tensor, selected: Tensor = selected) -> Tensor:
            whole = t.new_zeros(*selected.shape, *t.shape[1:])
            whole[selected] = t
            return whole

        for name, value in given.items():
            leaves = pytree.tree_leaves(value)
            if (
                isinstance(value, (list, tuple, dict))
                and leaves
                and all(isinstance(t, Tensor) and t.dim() == 2 and len(t) == number for t in leaves)
            ):
                found[name] = pytree.tree_map(spread, value)
                found[selector] = torch.arange(rows, device=selected.device)
    return found


def merged(one: Any, other: Any) -> Any:
    """What is known of an input from two calls: rather a mask of queries and keys than of keys, and all axes."""
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, dict) and isinstance(other, dict):
        return {key: merged(one.get(key), other.get(key)) for key in {**one, **other}}
    return other if isinstance(other, dict) or (isinstance(one, Tensor) and other.dim() > one.dim()) else one


def without_none(value: Any) -> Any:
    """A mask that is known to exist, but was never made, is one for each query and key."""
    if isinstance(value, dict):
        return {key: torch.ones(1, 1, 1, 1, dtype=torch.bool) if v is None else v for key, v in value.items()}
    return value


@dataclass(frozen=True)
class Sizes:
    """Of one call of a text part."""

    rows: int
    count: int
    """New tokens."""
    cached: int


def to_mask(value: Any, usual: Any, sizes: Sizes) -> Any:
    """A mask of the kind that the graphs take.

    Args:
        value: what the text part is called with. None if nothing is hidden but what comes later.
        usual: a mask of this kind: [batch, keys], [batch, heads, queries, keys], or one for each kind of layer.
        sizes: of the call.

    Raises:
        InputError: it is of another kind, or of another shape.
    """
    if isinstance(usual, dict):
        if value is not None and not isinstance(value, dict):
            raise InputError(f"generate: the graphs take a mask for each kind of layer, not {describe(value)}.")
        return {key: to_mask((value or {}).get(key), each, sizes) for key, each in usual.items()}
    keys = sizes.cached + sizes.count
    if value is None and usual.dim() == 2:
        return usual.new_ones(sizes.rows, keys)
    if value is None:
        value = torch.ones(sizes.count, keys, dtype=torch.bool, device=usual.device).tril(sizes.cached)[None, None]
    wanted = (keys,) if usual.dim() == 2 else (sizes.count, keys)
    if not isinstance(value, Tensor) or value.dim() != usual.dim() or value.shape[-len(wanted) :] != wanted:
        shape = ["batch", *(["heads"] if usual.dim() == 4 else []), *wanted]
        raise InputError(f"generate: the mask must be [{', '.join(map(str, shape))}], not {describe(value)}.")
    if usual.dim() == 4 and value.dtype == torch.bool and usual.dtype != torch.bool:
        value = torch.zeros_like(value, dtype=usual.dtype).masked_fill(~value, torch.finfo(usual.dtype).min)
    if usual.dim() == 2:
        value = whole_numbers("attention_mask", value)
    return value.expand(sizes.rows, *value.shape[1:])


def to_positions(value: Tensor | None, usual: Tensor, sizes: Sizes) -> Tensor:
    """Positions as the graphs take them.

    Args:
        value: [tokens], [batch or 1, tokens], or [axes, batch or 1, tokens]. None if each token follows the one before.
        usual: positions as the graphs take them.
        sizes: of the call.
    """
    if value is None:
        value = torch.arange(sizes.cached, sizes.cached + sizes.count, device=usual.device)
    return value.expand(*usual.shape[:-2], sizes.rows, sizes.count)


def zeros_like(rows: int, count: int, usual: Tensor) -> Tensor:
    """What stands for features that are absent. An index stays."""
    return usual if usual.dim() < 2 else usual.new_zeros(rows, count, *usual.shape[2:])


def describe(value: Any) -> str:
    """A value in words."""
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def check_pieces(mask: Any, pieces: list[tuple[int, int]]) -> None:
    """Check that no token sees one of a later piece.

    Args:
        mask: as `to_mask` gives it.
        pieces: the first position of each, and the position behind it.

    Raises:
        InputError: a token does. Those of an image do in some models.
    """
    for each in pytree.tree_leaves(mask):
        if not isinstance(each, Tensor) or each.dim() != 4:
            continue
        seen = each if each.dtype == torch.bool else each > torch.finfo(each.dtype).min
        first = pieces[0][0]
        if any(seen[..., begin - first : end - first, end:].any() for begin, end in pieces[:-1]):
            raise InputError(
                "generate: tokens see later ones that another graph processes, as those of an image do. Make the "
                "graphs with larger prompt_lengths, so that one holds the whole prompt."
            )


def check_states(mask: Any, begin: int) -> None:
    """Check that no padding follows a token where it changes a state.

    Args:
        mask: of keys, as `to_mask` gives it.
        begin: the first position that is processed token by token.

    Raises:
        InputError: there is padding.
    """
    seen = _of_keys(mask)
    if seen is not None and ((seen == 0) & (seen.cumsum(1) > 0))[:, begin:].any():
        raise InputError(
            f"generate: the mask hides tokens behind others after the first {begin}. There a model with a state can't "
            "skip them. Pad on the left, or make the graphs with larger prompt_lengths."
        )


def unseen_rows(mask: Any, end: int, batch: int) -> Tensor | None:
    """Which sequences of a batch have padding alone so far. None if there is none.

    Args:
        mask: of keys, as `to_mask` gives it.
        end: the position behind the last token.
        batch: how many sequences the graph processes.
    """
    seen = _of_keys(mask)
    unseen = None if seen is None else whole_batch(seen, batch)[:, :end].sum(1) == 0
    return unseen if unseen is not None and unseen.any() else None


def _of_keys(mask: Any) -> Tensor | None:
    """The mask of a model, or one of those of its layers, that is [batch, keys]."""
    return next((t for t in pytree.tree_leaves(mask) if isinstance(t, Tensor) and t.dim() == 2), None)
