"""The cost model: its constants are those that the fit gives, and its pages are made from it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import fit_cost, strategies
from benchmarks.measurements import KERNEL
from neuron_attn_rewrite.strategy import cost

DOCS = Path(__file__).parents[1] / "docs"


def test_the_constants_are_what_the_fit_gives() -> None:
    assert asdict(cost.fit()) == pytest.approx(asdict(fit_cost.fit()), rel=1e-3)


def test_held_out_points_lie_within_the_spread() -> None:
    training, checking = fit_cost.held_out(KERNEL)
    assert not set(training) & set(checking) and len(checking) * 3 >= len(KERNEL) - 2
    fitted = cost.fit()
    factors = [fit_cost.kernel_factor(p, fitted) for p in checking]
    widest = fitted.kernel_spread * 1.001  # it is rounded
    inside = [f for f in factors if 1 / widest <= f <= widest]
    assert len(inside) >= 0.9 * len(factors)


def test_the_pages_are_up_to_date() -> None:
    assert (DOCS / "cost_model.md").read_text(encoding="utf-8") == fit_cost.page(cost.fit())
    page = (DOCS / "strategies.md").read_text(encoding="utf-8")
    model = strategies.MODELS[0]
    assert f"## {model.name}" in page and "\n".join(strategies._section(model)) in page
    assert all(f"## {model.name}" in page for model in strategies.MODELS)
