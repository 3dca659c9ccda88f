"""The axis algebra against tensors that hold their own indices."""

from __future__ import annotations

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neuron_attn_rewrite.patterns.axes import (
    Atom,
    Dims,
    axis_dim,
    layout_steps,
    merged,
    refine,
    regroup,
    run_layout,
    sizes,
    split,
)

AXES = {0: 4, 1: 6, 2: 1, 3: 8}


def index_tensor(dims: Dims) -> Tensor:
    """A tensor over `dims` whose elements say, digit by digit, where on each axis they are."""
    out = torch.zeros(sizes(dims), dtype=torch.int64)
    for position, dim in enumerate(dims):
        index = torch.arange(out.shape[position])
        for atom in reversed(dim):
            digit = index % atom.size * atom.stride
            index = index // atom.size
            shape = [1] * out.dim()
            shape[position] = -1
            out = out + (digit * 100**atom.axis).reshape(shape)
    return out


def apply(op: str, value: Tensor, arg: tuple[int, ...]) -> Tensor:
    moved: Tensor = getattr(value, op)(arg)
    return moved


WHOLE: Dims = tuple(axis_dim(axis, size) for axis, size in AXES.items())


def factorings(n: int) -> st.SearchStrategy[tuple[int, ...]]:
    def cut(shape: tuple[int, ...]) -> st.SearchStrategy[tuple[int, ...]]:
        rest = n // prod(shape)
        if rest == 1:
            return st.just(shape)
        return st.sampled_from([d for d in range(2, rest + 1) if rest % d == 0]).flatmap(lambda d: cut((*shape, d)))

    return cut(())


@given(factorings(prod(AXES.values())))
def test_regroup_is_reshape(shape: tuple[int, ...]) -> None:
    regrouped = regroup(WHOLE, shape)
    if regrouped is not None:
        assert torch.equal(index_tensor(regrouped), index_tensor(WHOLE).reshape(shape))


@given(st.permutations(range(4)), st.permutations(range(4)), factorings(prod(AXES.values())))
def test_layout_steps_brings_every_element_home(first: list[int], second: list[int], shape: tuple[int, ...]) -> None:
    source = regroup(tuple(WHOLE[i] for i in first), shape)
    target = tuple(WHOLE[i] for i in second)
    if source is None:
        return
    layout = layout_steps(source, target)
    assert layout is not None
    assert torch.equal(run_layout(layout, index_tensor(source), apply), index_tensor(target))


def test_layout_steps_broadcasts_what_is_missing() -> None:
    heads, rows = axis_dim(0, 4), axis_dim(1, 6)
    layout = layout_steps((rows,), (heads, rows))
    assert layout is not None
    assert run_layout(layout, torch.arange(6), apply).shape == (1, 6)
    full = layout_steps((rows,), (heads, rows), full=True)
    assert full is not None
    assert run_layout(full, torch.arange(6), apply).shape == (4, 6)


def test_layout_steps_expands_a_dim_of_which_it_has_a_part() -> None:
    """A mask for each window, windows folded into the batch."""
    batch_of_windows = (Atom(0, 1, 3), Atom(1, 1, 4))
    layout = layout_steps(((Atom(1, 1, 4),),), (batch_of_windows,))
    assert layout is not None
    assert run_layout(layout, torch.arange(4), apply).tolist() == [0, 1, 2, 3] * 3


def test_layout_steps_refuses_what_the_target_does_not_have() -> None:
    assert layout_steps((axis_dim(0, 4), axis_dim(1, 6)), (axis_dim(0, 4),)) is None


def test_split_at_digit_boundaries_only() -> None:
    assert split(axis_dim(0, 6), 3) == ((Atom(0, 3, 2),), (Atom(0, 1, 3),))
    assert split(axis_dim(0, 6), 4) is None
    assert split((Atom(0, 1, 4), Atom(1, 1, 6)), 8) is None


def test_merged_digits_are_one_axis_again() -> None:
    assert merged((Atom(0, 3, 2), Atom(0, 1, 3))) == axis_dim(0, 6)
    assert merged((Atom(0, 1, 3), Atom(0, 3, 2))) != axis_dim(0, 6)


def test_refine_cuts_where_others_are_cut() -> None:
    assert refine(axis_dim(0, 6), (Atom(0, 3, 2),)) == (Atom(0, 3, 2), Atom(0, 1, 3))
    assert refine(axis_dim(0, 6), (Atom(1, 3, 2),)) == axis_dim(0, 6)
