"""Every pattern that Inductor's fuse_attention knows, by its own search functions and example inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.fx_passes.fuse_attention import _get_sfdp_patterns

from neuron_attn_rewrite import RewriteConfig, rewrite
from neuron_attn_rewrite.config.options import TOLERANCES
from tests.helpers import ALWAYS, relative_error


class Pattern(nn.Module):
    def __init__(self, function: Callable[..., Any], numbers: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.numbers = function, numbers

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, **self.numbers)


def patterns() -> Iterator[Any]:
    """Each pattern with its dropout at 0, so that those for training are those of inference once more."""
    device = (torch.device("cpu"),) if inspect.signature(_get_sfdp_patterns).parameters else ()
    for name, entry in _get_sfdp_patterns(*device):
        numbers = {key: 0.0 if key == "dropout_p" else value for key, value in entry["scalar_workaround"].items()}
        short = name.replace("_sfdp_pattern_", "").replace("inference", "eval")
        yield pytest.param(Pattern(entry["search_fn"], numbers), entry["example_inputs"], id=short)


def fresh(like: Tensor) -> Tensor:
    """An input of the example's dtype and shape; the one that is 128 x 128 is made smaller."""
    if like.dtype == torch.bool:
        return torch.rand(like.shape) > 0.2
    shape = (2, 16, 32) if like.dim() == 3 else like.shape
    return torch.full(shape, 2.0, dtype=like.dtype) if like.dim() == 0 else torch.randn(shape).to(like.dtype)


@pytest.mark.parametrize(("model", "like"), list(patterns()))
def test_found_and_replaced(model: Pattern, like: list[Tensor]) -> None:
    """Where the model rounds to half precision on its way, the numbers are those of float64."""
    torch.manual_seed(0)
    example = tuple(map(fresh, like))
    try:
        rewritten = rewrite(model, example, config=CONFIG)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            torch.export.export(model, example, strict=False).module()(*example)
        pytest.skip("torch.export of this version drops a cast, and its own graph does not run")
    (site,) = rewritten.report.replaced
    assert not rewritten.report.kept
    inputs = tuple(map(fresh, like))
    with torch.no_grad():
        expected = _first(model(*inputs))
        got = _first(rewritten(*inputs))
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert relative_error(got, expected) < (2e-5 if expected.dtype == torch.float32 else 2e-2)
    assert site.max_error is not None and site.max_error <= TOLERANCES[expected.dtype]


CONFIG = RewriteConfig(policy="always", empty_rows="any")
"""In half precision pattern 19 fills with -65504 and adds a float32 mask to it: a row without keys is then a softmax of
that mask, which no kernel gives."""


def test_every_pattern_is_there() -> None:
    names = {str(case.id).split("_")[0] for case in patterns()}
    assert len(names) >= 24 and "1" in names and "19" in names


def test_exact_rows_without_keys_are_why_one_needs_a_promise() -> None:
    model, like = next(case.values for case in patterns() if case.id == "19_half_eval")
    (site,) = rewrite(model, tuple(map(fresh, like)), config=ALWAYS).report.kept
    assert "a query that sees no key" in site.reasons[-1]


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value
