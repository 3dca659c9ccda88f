"""A defect of this package in the analysis of one attention: that one stays native, the others are replaced."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from neuron_attn_rewrite import InputError, RewriteConfig, RewriteReport, rewrite
from tests.helpers import ALWAYS, kernel_calls

QUIET = RewriteConfig(policy="always")


class Layer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, x, x)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Layer(), Layer()

    def forward(self, x: Tensor) -> Tensor:
        scores = self.second(self.first(x)) @ x.mT
        return scores.softmax(-1) @ x


def failing(name: str, error: Exception) -> Callable[..., Any]:
    """The function of that path, but it fails for the site or node of `second`."""
    module, _, function = name.rpartition(".")
    real = getattr(__import__(module, fromlist=[function]), function)

    def failing(*args: Any) -> Any:
        words = repr([getattr(a, "name", "") or getattr(getattr(a, "site", None), "name", "") for a in args])
        if any(word in words for word in ("'second'", "scaled_dot_product_attention_1")):
            raise error
        return real(*args)

    return failing


PLACES = (
    "neuron_attn_rewrite.patterns.find.find_sdpa",
    "neuron_attn_rewrite.strategy.decide.obstacle",
    "neuron_attn_rewrite.strategy.decide.at_example",
)


@pytest.mark.parametrize("place", PLACES)
def test_one_site_fails(place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(place, failing(place, AttributeError("_tensor_constant0")))
    x, model = torch.randn(1, 2, 8, 4), Two()
    with caplog.at_level(logging.DEBUG, "neuron_attn_rewrite"):
        rewritten = rewrite(model, (x,), config=QUIET)
    assert len(kernel_calls(rewritten)) == 2
    torch.testing.assert_close(rewritten(x), model(x))
    (kept,) = rewritten.report.kept
    assert kept.reasons[-1].code == "internal-error" and "please report it" in kept.reasons[-1]
    assert kept.name == "second" and "AttributeError: _tensor_constant0" in kept.traceback
    assert kept.traceback in caplog.text
    assert not any(site.traceback for site in rewritten.report.replaced)
    again = RewriteReport.from_json(rewritten.report.to_json())
    assert again.kept[0].traceback == kept.traceback
    with pytest.raises(AttributeError, match="_tensor_constant0"):
        rewrite(model, (x,), config=ALWAYS)


def test_one_kernel_call_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from neuron_attn_rewrite.replace.emit import Emitter

    real, calls = Emitter.kernel_call, iter(range(3))

    def kernel_call(self: Emitter, *args: Any) -> Any:
        result = real(self, *args)
        if next(calls) == 1:
            raise KeyError("of this package")
        return result

    monkeypatch.setattr(Emitter, "kernel_call", kernel_call)
    x, model = torch.randn(1, 2, 8, 4), Two()
    rewritten = rewrite(model, (x,), config=QUIET)
    assert len(kernel_calls(rewritten)) == 2
    assert rewritten.report.kept[0].reasons[-1].code == "internal-error"
    torch.testing.assert_close(rewritten(x), model(x))


def test_errors_on_purpose_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PLACES[1], failing(PLACES[1], InputError("on purpose")))
    with pytest.raises(InputError, match="on purpose"):
        rewrite(Two(), (torch.randn(1, 2, 8, 4),), config=QUIET)
