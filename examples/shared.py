"""Code of all examples: a progress bar, the rewrite, the comparison, and the report at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from neuron_attn_rewrite import RewriteConfig, rewrite

TOLERANCE = 1e-4
"""Largest difference of the outputs, relative to the largest value."""
console = Console(highlight=False)


@torch.no_grad()
def show(
    name: str,
    build: Callable[[], nn.Module],
    inputs: Callable[[], dict[str, Any]],
    *,
    expected: int,
    config: RewriteConfig | None = None,
) -> int:
    """Build a model, rewrite it, compare it with the original on fresh inputs, and print the report.

    Args:
        name: a title.
        build: makes the model, in eval mode.
        inputs: makes keyword inputs, other ones each time.
        expected: how many attentions must be replaced; more or fewer is a failure.
        config: see `RewriteConfig`; by default a kernel wherever one is legal.

    Returns:
        The exit code: 0 if the outputs agree.
    """
    torch.manual_seed(0)
    config = config or RewriteConfig(target="trn2", policy="always", require=expected)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"{name}: building the model", total=4)
        model = build().eval()
        progress.update(task, advance=1, description="Capturing, proving, replacing, verifying")
        rewritten = rewrite(model, (), inputs(), config=config)
        progress.update(task, advance=1, description="Running the original")
        fresh = inputs()
        old = model(**fresh)
        progress.update(task, advance=1, description="Running the rewritten graph")
        new = rewritten(**fresh)
        progress.update(task, advance=1)
    error = max(_difference(a, b) for a, b in zip(*map(pytree.tree_leaves, (old, new)), strict=True))
    console.print(str(rewritten.report), markup=False, soft_wrap=True)
    holds = error <= TOLERANCE
    mark = "[green]ok[/]     " if holds else "[bold red]WRONG[/]  "
    console.print(
        f"\n{mark} {name}: outputs differ by {error:.1e} of the largest value (at most {TOLERANCE:.0e})", soft_wrap=True
    )
    return 0 if holds else 1


def _difference(old: Any, new: Any) -> float:
    if not isinstance(old, Tensor) or not old.is_floating_point():
        return 0.0
    return float((new - old).abs().max() / old.abs().max().clamp_min(1e-30))
