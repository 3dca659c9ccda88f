"""Rules from outside of the package, as docs/patterns.md tells it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_attn_rewrite import InputError, patterns, rewrite
from tests.helpers import ALWAYS, Function, relative_error
from tests.patterns.cases import qkv

PAGE = Path(__file__).parents[2] / "docs" / "patterns.md"


def test_the_page_runs() -> None:
    known: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), known)
    model, inputs = known["Attention"](), qkv()
    rewritten = rewrite(model, qkv(), config=ALWAYS)
    assert len(rewritten.report.replaced) == 1
    assert relative_error(rewritten(*inputs), model(*inputs)) < 2e-5
    known["registration"].undo()
    assert rewrite(model, inputs, config=ALWAYS).report.sites == ()
    known["registration"].undo()


def sine(walk: patterns.Walk, scores: patterns.Scores) -> patterns.Scores:
    """Not the truth: sin(x) is not x."""
    return scores.to(scores.node.args[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_wrong_rule_is_caught_on_the_example(dtype: torch.dtype) -> None:
    model = Function(lambda q, k, v: torch.softmax(torch.sin(q @ k.mT), -1) @ v)
    inputs = tuple(x.to(dtype) for x in qkv())
    with patterns.register("scores", "sin", sine), pytest.warns(UserWarning, match="put back"):
        assert not rewrite(model, inputs, config=ALWAYS).report.replaced
    (site,) = rewrite(model, inputs, config=ALWAYS).report.kept
    assert any("sin" in reason and "no rule knows it" in reason for reason in site.reasons)


def test_a_rule_may_leave_a_node_to_the_others() -> None:
    asked: list[str] = []

    def other(walk: patterns.Walk, scores: patterns.Scores) -> None:
        asked.append(scores.node.name)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT * 0.25, -1) @ v

    with patterns.register("scores", "mul", other):
        assert len(rewrite(Function(attention), qkv(), config=ALWAYS).report.replaced) == 1
    assert asked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("score", "mul", sine), "no table 'score': choose one of 'product', 'scores', 'softmax', 'weights'"),
        (("scores", "aten::mul", sine), "without namespace"),
        (("scores", "mul", None), "must be a function"),
    ],
)
def test_wrong_registrations(arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        patterns.register(*arguments)
