"""A graph that runs with kernel calls beside attentions: who sees which values, and what the run leaves as it was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.masks.proof import Proof
from neuron_attn_rewrite.replace.graft import Graft
from neuron_attn_rewrite.replace.running import ModelError, Runs, needed

aten = torch.ops.aten


def fails(*_: Any, words: str = "no") -> Tensor:
    raise ValueError(words)


class Setting:
    """`output` stands for an attention, and `result` for its kernel call. `early` is read by `output` only."""

    def __init__(self) -> None:
        self.module = fx.GraphModule(nn.Module(), fx.Graph())
        self.graph = self.module.graph
        self.x, self.y = self.graph.placeholder("x"), self.graph.placeholder("y")
        self.unused = self.call(aten.cos.default, self.x)
        self.early = self.call(aten.mul.Tensor, self.x, 2)
        self.output = self.call(aten.add.Tensor, self.early, 1)
        self.added: tuple[fx.Node, ...] = ()

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def runs(self, result: fx.Node, *ends: fx.Node) -> tuple[Runs, Graft]:
        self.graph.output((*ends,))
        verdict: Any = SimpleNamespace(site=SimpleNamespace(output=self.output))
        graft = Graft(verdict, Proof(), result, (*self.added, result))
        return Runs(self.module, [graft]), graft


X, Y = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.ones(2, 3)


def test_a_visit_sees_what_it_reads_and_the_run_goes_on_with_what_it_gives() -> None:
    setting = Setting()
    result = setting.call(aten.neg.default, setting.output)
    late = setting.call(aten.add.Tensor, setting.output, setting.y)
    runs, graft = setting.runs(result, late)
    seen: list[Any] = []

    def visit(of: Graft, values: Any, new: Tensor | Exception) -> Tensor:
        seen.append((of, new, values[setting.early], values[setting.unused], values[setting.output], values[setting.x]))
        return torch.full((2, 3), 7.0)

    (found,) = runs.run((X, Y), {graft: [setting.early, setting.unused, setting.output, setting.x]}, visit)
    ((of, new, early, unused, output, x),) = seen
    assert of is graft and torch.equal(new, -(2 * X + 1)) and torch.equal(early, 2 * X)
    assert torch.equal(unused, X.cos()) and torch.equal(output, 2 * X + 1)
    assert torch.equal(found, torch.full((2, 3), 8.0))
    assert x is X, "an input that is not written is not copied"
    (found,) = runs.run((X, Y), {graft: [setting.output]}, lambda *_: None)
    assert torch.equal(found, 2 * X + 1 + Y)
    (found,) = runs.run((X, Y), {}, visit)
    assert len(seen) == 1 and torch.equal(found, 2 * X + 1 + Y), "an attention without reads is not visited"


def test_what_is_not_read_any_more_is_freed() -> None:
    setting = Setting()
    result = setting.call(aten.neg.default, setting.output)
    runs, graft = setting.runs(result, setting.output)
    kept: list[set[fx.Node]] = []
    runs.run((X, Y), {graft: [setting.output]}, lambda _, values, __: kept.append(set(values)))
    runs.run((X, Y), {graft: [setting.early]}, lambda _, values, __: kept.append(set(values)))
    assert setting.early not in kept[0] and setting.early in kept[1] and setting.output in kept[1]


def test_with_given_values_only_what_is_needed_runs() -> None:
    """The given placeholder still takes its input, so that the other one gets its own."""
    setting = Setting()
    outside = setting.call(fails, setting.x)
    result = setting.call(aten.add.Tensor, setting.output, setting.y)
    behind = setting.call(aten.neg.default, setting.output)
    runs, graft = setting.runs(result, outside, behind)
    for given, expected in ((setting.x, 5 * Y), (setting.early, 4 * Y)):
        seen: list[Any] = []

        def visit(of: Graft, values: Any, new: Any, seen: list[Any] = seen) -> None:
            seen.append((new, values[setting.y]))

        found = runs.run((X, 2 * Y), {graft: [setting.y]}, visit, {given: lambda: torch.ones(2, 3)})
        ((new, y),) = seen
        assert found is None and torch.equal(new, expected) and torch.equal(y, 2 * Y)
    with pytest.raises(ModelError):
        runs.run((X, Y), {graft: []}, lambda *_: None)


def test_the_error_of_a_kernel_call_goes_to_the_visit() -> None:
    """It is the first one, also if nodes behind it read several that failed."""
    setting = Setting()
    first = setting.call(fails, setting.output, words="first")
    second = setting.call(fails, setting.output, words="second")
    setting.added = (first, second)
    result = setting.call(aten.add.Tensor, first, second)
    runs, graft = setting.runs(result, setting.output)
    seen: list[Any] = []
    (found,) = runs.run((X, Y), {graft: []}, lambda _, __, new: seen.append(new))
    assert [str(error) for error in seen] == ["first"] and torch.equal(found, 2 * X + 1)


def test_the_error_of_the_model_is_raised_with_what_it_read() -> None:
    setting = Setting()
    broken = setting.call(fails, setting.y, words="broken")
    runs, graft = setting.runs(setting.call(aten.neg.default, setting.output), broken)
    with pytest.raises(ModelError, match="broken") as caught:
        runs.run((X, Y), {graft: []}, lambda *_: None)
    assert caught.value.node is broken and caught.value.values == {setting.y: Y}


def test_a_view_takes_any_strides_and_other_operators_are_as_they_are() -> None:
    setting = Setting()
    result = setting.call(aten.neg.default, setting.output)
    view = setting.call(aten.view.default, setting.output, [6])
    runs, graft = setting.runs(result, view)
    (found,) = runs.run((X, Y), {graft: []}, lambda *_: X.mT.contiguous().mT)
    assert torch.equal(found, X.flatten())


def test_inputs_and_random_state_stay_and_each_run_draws_the_same() -> None:
    setting = Setting()
    written = setting.call(aten.add_.Tensor, setting.y, 1)
    drawn = setting.call(aten.rand.default, [3])
    for node in setting.graph.nodes:
        node.meta["val"] = FakeTensorMode().from_tensor(Y)
    runs, graft = setting.runs(setting.call(aten.neg.default, setting.output), written, drawn)
    y, state = Y.clone(), torch.get_rng_state()
    one = runs.run((X, y), {graft: []}, lambda *_: None)
    two = runs.run((X, y), {graft: []}, lambda *_: None)
    assert torch.equal(one[0], Y + 1) and torch.equal(y, Y) and torch.equal(one[1], two[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_values_are_those_of_the_placeholders_whatever_the_module_is_called_with() -> None:
    setting = Setting()
    runs, graft = setting.runs(setting.call(aten.neg.default, setting.output), setting.output, setting.y)
    of_call = pytree.tree_structure((({"x": 0, "y": 0},), {}))
    of_return = pytree.tree_structure({"a": 0, "b": 0})
    setting.graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(["given"], of_call, of_return)))
    found = runs.run((X, Y), {graft: []}, lambda *_: None)
    assert isinstance(found, tuple) and torch.equal(found[0], 2 * X + 1) and found[1] is Y


def test_needed() -> None:
    setting = Setting()
    assert needed([setting.output], ()) == {setting.output, setting.early, setting.x}
    assert needed([setting.output, setting.y], [setting.early]) == {setting.output, setting.early, setting.y}
