"""What `compare` makes of the errors that are measured. Only the measuring, and what is drawn, is given here."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from neuron_attn_rewrite import RewriteConfig
from neuron_attn_rewrite.errors import CaptureError, InputError
from neuron_attn_rewrite.masks.proof import Proof
from neuron_attn_rewrite.replace import verify
from neuron_attn_rewrite.replace.draws import Draw
from neuron_attn_rewrite.replace.graft import Graft
from neuron_attn_rewrite.replace.verify import Compared, compare

aten = torch.ops.aten
STRICT = RewriteConfig(strict=True)
TOLERANCE = 1 / 16
SIZE = 8.0
"""The output of the graph."""
EXAMPLE = "on the example inputs"
Pair = tuple[float, float]


class Setting:
    """Two attentions, and a graph that returns the sum of their outputs. Each output has 4 elements."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, result: Callable[[Tensor], Tensor] = aten.neg.default) -> None:
        self.module = fx.GraphModule(nn.Module(), fx.Graph())
        self.graph = self.module.graph
        x, y = self.graph.placeholder("x"), self.graph.placeholder("y")
        self.grafts = []
        for node in (x, y):
            output = self.graph.call_function(aten.mul.Tensor, (node, 1))
            made = self.graph.call_function(result, (output,))
            verdict: Any = SimpleNamespace(site=SimpleNamespace(output=output))
            self.grafts.append(Graft(verdict, Proof(), made, (made,)))
            output.meta["val"] = torch.zeros(4)
        first, second = (g.verdict.site.output for g in self.grafts)
        self.sum = self.graph.call_function(aten.add.Tensor, (first, second))
        self.graph.output((self.sum,))
        self.errors: Pair = (0, 0)
        self.changes: Pair = (0, 0)
        self.noise: Pair = (0, 0)
        self.inputs: tuple[Any, Any] = (torch.full((4,), SIZE / 2), torch.full((4,), SIZE / 2))
        monkeypatch.setattr(verify, "Measured", lambda *_: self._measured())
        self.draw(monkeypatch, [])

    def _measured(self) -> Any:
        at = self.grafts.index

        def change(graft: Graft, values: Any, by: Pair) -> Any:
            return values[graft.verdict.site.output] + by[at(graft)]

        return SimpleNamespace(
            sizes={},
            reads=lambda graft: [graft.verdict.site.output],
            tolerance=lambda _: TOLERANCE,
            error=lambda graft, values, _: self.errors[at(graft)] * float(values[graft.verdict.site.output][0]) / 4,
            instead=lambda graft, values, _: change(graft, values, self.changes),
            noise=lambda graft, values, _: change(graft, values, self.noise),
        )

    def draw(self, monkeypatch: pytest.MonkeyPatch, drawn: list[Draw], fit: Any = None) -> None:
        monkeypatch.setattr(verify, "draws", lambda *_: drawn)
        monkeypatch.setattr(verify, "drawn_operands", lambda *_: (self.grafts if fit is None else fit, {}))

    def compare(self) -> list[Compared]:
        found = compare(self.module, self.grafts, self.inputs, STRICT)
        return [found[g] for g in self.grafts]


OUTPUTS: dict[str, tuple[Pair, Pair, Pair, tuple[float | None, float | None]]] = {
    "nothing": ((0, 0), (0, 0), (0, 0), (None, None)),
    "the largest growth": ((0, 0), (5, 0), (0, 0), (None, None)),
    "more than the largest growth": ((0, 0), (5.25, 0), (0, 0), (5.25, None)),
    "an error of the tolerance": ((TOLERANCE, 0), (6, 0), (0, 0), (6, None)),
    "an attention that is wrong itself": ((0.5, 0), (6, 0), (0, 0), (None, None)),
    "as noise does": ((0, 0), (6, 0), (1.5, 0), (None, None)),
    "more than noise does": ((0, 0), (7, 0), (1.5, 0), (7, None)),
    "one of both": ((0, 0), (6, 7), (1, 0.5), (None, 7)),
    "only together": ((0, 0), (4, 4), (0, 0), (8, 8)),
}
"""The errors of two attentions, what their results and noise add to the output of the graph, and the errors of that."""


@pytest.mark.parametrize("name", OUTPUTS)
def test_errors_in_the_outputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(monkeypatch)
    setting.errors, setting.changes, setting.noise, caused = OUTPUTS[name]
    assert setting.compare() == [
        Compared(own, EXAMPLE) if by is None else Compared(by / SIZE, f"in the outputs of the model, {EXAMPLE}")
        for own, by in zip(setting.errors, caused, strict=True)
    ]


def test_attentions_that_are_all_wrong_and_outputs_of_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(monkeypatch)
    setting.errors, setting.changes = (0.5, 0.25), (7, 7)
    assert setting.compare() == [Compared(0.5, EXAMPLE), Compared(0.25, EXAMPLE)]
    setting.errors = (0, 0)
    with setting.graph.inserting_after(setting.sum):
        whole = setting.graph.call_function(aten.to.dtype, (setting.sum, torch.int64))
    setting.graph.output_node().args = ((whole,),)
    assert setting.compare() == [Compared(0, EXAMPLE)] * 2


def test_the_error_that_a_kernel_call_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Tensor) -> Tensor:
        raise ValueError("not here")

    found = Setting(monkeypatch, fails).compare()
    assert found == [Compared(torch.inf, f"{EXAMPLE}, the kernel call raises ValueError: not here")] * 2


def values(factor: float) -> tuple[Tensor, Tensor]:
    return torch.full((4,), 4 * factor), torch.full((4,), 4.0)


@pytest.mark.parametrize(("elements", "whole"), [(7, []), (8, ["c"]), (23, ["b", "c"]), (100, ["a", "b", "c"])])
def test_draws(elements: int, whole: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph, which has 8 elements, runs as a whole on the last draws."""
    setting = Setting(monkeypatch)
    drawn = [Draw(word, 0, (values(factor),)) for word, factor in {"a": 1, "b": 3, "c": 2}.items()]
    setting.draw(monkeypatch, drawn)
    setting.errors = (0.015625, 0)
    monkeypatch.setattr(verify, "MOST_ELEMENTS", elements)
    seen: list[str] = []
    compare_graph = verify._compare_graph
    monkeypatch.setattr(verify, "_compare_graph", lambda *given: (seen.append(given[-1]), compare_graph(*given))[1])
    assert setting.compare() == [Compared(3 / 64, "on inputs b", 3), Compared(0, EXAMPLE, 3)]
    assert seen == [EXAMPLE, *(f"on inputs {word}" for word in whole)]


def test_a_draw_on_which_the_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its later values are tried. Without any that run, it does not count."""
    setting = Setting(monkeypatch)
    wrong = (torch.zeros(4, 3), torch.zeros(2, 5))
    with setting.graph.inserting_before(setting.grafts[0].verdict.site.output):
        setting.graph.call_function(aten.add.Tensor, tuple(setting.graph.find_nodes(op="placeholder")))
    setting.draw(monkeypatch, [Draw("a", 0, (wrong, values(2))), Draw("b", 0, (wrong, wrong))])
    setting.errors = (0.015625, 0)
    assert setting.compare() == [Compared(2 / 64, "on inputs a", 1), Compared(0, EXAMPLE, 1)]


def test_an_attention_that_is_only_compared_in_the_whole_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(monkeypatch)
    setting.draw(monkeypatch, [Draw("a", 0, (values(2),))], setting.grafts[1:])
    setting.errors = (0.015625, 0)
    assert setting.compare() == [Compared(2 / 64, "on inputs a", 1), Compared(0, EXAMPLE, 1)]


def test_without_attentions_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(monkeypatch)
    setting.grafts.clear()
    monkeypatch.setattr(verify, "draws", None)
    assert setting.compare() == []


def test_the_larger_error_stays() -> None:
    first, same, larger = Compared(1, "first", 2), Compared(1, "same", 3), Compared(2, "larger", 4)
    assert verify._worse(first, None) is first
    assert verify._worse(first, same) == Compared(1, "first", 5)
    assert verify._worse(first, larger) == verify._worse(larger, first) == Compared(2, "larger", 6)


def test_outputs_that_are_compared() -> None:
    real, whole, both = torch.zeros(1), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.complex64)
    found = verify._floating((real, [whole, None], {"a": both}))
    assert len(found) == 2 and found[0] is real and found[1] is both


@pytest.mark.parametrize("words", ["`x` holds 7", None])
def test_a_graph_that_does_not_run(words: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(monkeypatch)
    setting.inputs = (torch.zeros(3), torch.zeros(4))
    monkeypatch.setattr(verify, "out_of_range", lambda *_: words)
    with pytest.raises(InputError if words else CaptureError, match=words or "does not run on the example inputs"):
        setting.compare()
