"""Gradients that a model defines itself: a captured graph does not have them, so none is made if it may be trained."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neuron_attn_rewrite import CaptureError, collect_reports, rewrite
from neuron_attn_rewrite.capture.export import capture
from neuron_attn_rewrite.capture.own_gradients import _without_vmap
from tests.capture.test_objects import call_of, default_model
from tests.helpers import ALWAYS, relative_error


class Sharpened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 3


@torch.library.custom_op("test_own_gradients::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


doubled.register_fake(torch.empty_like)
doubled.register_autograd(lambda ctx, grad: grad * 5)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16)

    def change(self, x: Tensor) -> Tensor:
        return x.sin()

    def forward(self, x: Tensor) -> Tensor:
        x = self.change(self.project(x))
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


class WithFunction(Attends):
    def change(self, x: Tensor) -> Tensor:
        return Sharpened.apply(x)  # type: ignore[no-any-return]


class WithHook(Attends):
    def change(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda grad: grad * 2)
        return x.sin()


class WithBackwardHook(Attends):
    def __init__(self) -> None:
        super().__init__()
        self.project.register_full_backward_hook(
            lambda module, grads, _: tuple(None if g is None else g * 2 for g in grads)
        )


class Checkpointed(Attends):
    def change(self, x: Tensor) -> Tensor:
        return checkpoint(torch.sin, x, use_reentrant=False)  # type: ignore[no-any-return]


class WithOperator(Attends):
    def change(self, x: Tensor) -> Tensor:
        return doubled(x)


class WithoutGradient(Attends):
    def change(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            shift = Sharpened.apply(x)
        return x + shift


def inputs() -> Tensor:
    return torch.randn(1, 2, 64, 16)


def gradient(model: nn.Module, call: Any, x: Tensor) -> Tensor:
    model.zero_grad()
    call(x).square().sum().backward()
    weight = model.project.weight
    assert isinstance(weight, nn.Parameter) and weight.grad is not None
    return weight.grad.clone()


OWN = [(WithFunction, "Sharpened"), (WithHook, "register_hook"), (WithBackwardHook, "BackwardHookFunction")]


@pytest.mark.parametrize(("kind", "name"), OWN)
def test_what_may_be_trained_is_refused(kind: type[Attends], name: str) -> None:
    with pytest.raises(CaptureError, match=rf"(?s){name}.*eval\(\).*gradients=False"):
        rewrite(kind().train(), (inputs(),), config=ALWAYS)


def test_a_capture_without_gradients_is_refused_too() -> None:
    with torch.no_grad(), pytest.raises(CaptureError, match="Sharpened"):
        rewrite(WithFunction().train(), (inputs(),), config=ALWAYS)


@pytest.mark.parametrize(("kind", "name"), OWN)
def test_what_is_not_trained_is_rewritten(kind: type[Attends], name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = inputs()
        for model, config in (
            (kind().eval(), ALWAYS),
            (kind().train(), replace(ALWAYS, gradients=False)),
            (kind().train().requires_grad_(False), ALWAYS),
        ):
            new = rewrite(model, (inputs(),), config=config)
            assert new.report.replaced
            assert relative_error(new(x), model(x)) < 1e-5
    with pytest.raises(CaptureError, match=name):
        rewrite(kind().eval(), (inputs(),), config=replace(ALWAYS, gradients=True))


@pytest.mark.parametrize("kind", [Attends, Checkpointed, WithOperator, WithoutGradient])
def test_gradients_that_the_graph_has(kind: type[Attends]) -> None:
    model, x = kind().train(), inputs()
    new = rewrite(model, (inputs(),), config=ALWAYS)
    assert new.report.replaced
    assert relative_error(gradient(model, new, x), gradient(model, model, x)) < 1e-4


def test_dynamo_is_asked_too() -> None:
    class Numpy(WithFunction):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.as_tensor(x.numpy() * 2)

    assert capture(Numpy().train(), (inputs(),)).own_gradients == ("torch.autograd.Function",)


@pytest.mark.parametrize("kind", [WithFunction, WithHook])
def test_a_compiled_graph_keeps_its_gradients(kind: type[Attends]) -> None:
    torch._dynamo.reset()
    model, x = kind().train(), inputs()
    options = {"policy": "always", "inner": "eager"}
    with collect_reports():
        new = torch.compile(model, backend="neuron_attn_rewrite", options=options)  # type: ignore[arg-type]
        assert relative_error(gradient(model, new, x), gradient(model, model, x)) < 1e-4


def test_a_compiled_graph_with_a_function_says_why() -> None:
    torch._dynamo.reset()
    options = {"policy": "always", "inner": "eager"}
    model = WithFunction().train()
    with collect_reports() as reports:
        torch.compile(model, backend="neuron_attn_rewrite", options=options)(inputs())  # type: ignore[arg-type]
    (site,) = reports.report.kept
    assert [reason.code for reason in site.reasons] == ["own-gradient"]
    with collect_reports() as reports, torch.no_grad():
        torch.compile(model, backend="neuron_attn_rewrite", options=options)(inputs())  # type: ignore[arg-type]
    assert reports.report.replaced


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "t5"])
def test_masks_of_transformers_define_no_gradients(name: str) -> None:
    """Some are made by torch.vmap, which indexes with a function of its own on torch 2.9."""
    model = default_model(name)
    ids, given = call_of(name, 0, 3)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    assert not capture(model.train(), (ids,), given).own_gradients


def test_a_function_under_vmap_keeps_its_name() -> None:
    assert _without_vmap("VmappedVmappedModIndex") == "ModIndex"
    assert _without_vmap("Sharpened") == "Sharpened"
