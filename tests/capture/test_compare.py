"""The captured graph against the model: outputs, what is written, and several calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuron_attn_rewrite import CaptureError, rewrite
from neuron_attn_rewrite.capture.compare import difference_with_nan
from tests.helpers import ALWAYS, Function, relative_error


class Running(nn.Module):
    """Adds each input to a running sum, which is a buffer, and attends to the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(1, 2, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x)
        return nn.functional.scaled_dot_product_attention(x, self.total, x)


class Dropped(Running):
    """While it is traced, it does not write."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return nn.functional.scaled_dot_product_attention(x, self.total + x, x)
        return super().forward(x)


class Hidden(nn.Module):
    """Its running sum is no buffer, but a tensor in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = SimpleNamespace(total=torch.zeros(1, 2, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return nn.functional.scaled_dot_product_attention(x, self.kept.total + x, x)
        self.kept.total.add_(x)
        return nn.functional.scaled_dot_product_attention(x, self.kept.total, x)


class Replaced(Hidden):
    """Each call makes another tensor for the sum."""

    def forward(self, x: Tensor) -> Tensor:
        total = self.kept.total + x
        if not torch.compiler.is_exporting():
            self.kept.total = total
        return nn.functional.scaled_dot_product_attention(x, total, x)


class Counting(nn.Module):
    """Another path at the third call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            self.calls += 1
        return nn.functional.scaled_dot_product_attention(x, x, x) * (2 if self.calls > 2 else 1)


class Constant(nn.Module):
    """The length of its cache becomes a constant while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(1, 2, 8, 4))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        self.cache.index_copy_(2, position, x * (position + 1))
        length = 1 if torch.compiler.is_exporting() else int(position) + 1
        seen = torch.arange(8) < length
        return nn.functional.scaled_dot_product_attention(x, self.cache, self.cache, attn_mask=seen[None])


class Other(Running):
    """While it is traced, it writes the sum of two calls."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.total.add_(x if torch.compiler.is_exporting() else 0)
        return out


class Lazy(nn.Module):
    """Its first call makes what it keeps: in an object, and in a list of it."""

    def __init__(self, is_state: bool) -> None:
        super().__init__()
        self.is_state, self.kept = is_state, SimpleNamespace(total=None, parts=[])

    def forward(self, x: Tensor) -> Tensor:
        if self.kept.total is None:
            self.kept.total = torch.zeros_like(x)
            self.kept.parts.append(torch.ones_like(x))
        if self.is_state:
            self.kept.total.add_(x)
        return nn.functional.scaled_dot_product_attention(x, x + self.kept.total, x * self.kept.parts[0])


@pytest.mark.parametrize("is_state", [False, True])
def test_what_the_first_call_makes_is_not_left_behind_by_a_trace(is_state: bool) -> None:
    """A table that is made once is right to make again. State that is made so would be lost."""
    model, x = Lazy(is_state), torch.randn(1, 2, 8, 4)
    if is_state:
        with pytest.raises(CaptureError, match=r"differs by .* at call 2.* \(it changes .*kept.total"):
            rewrite(model, (x,), config=ALWAYS)
    else:
        rewritten = rewrite(model, (x,), config=ALWAYS)
        for _ in range(2):
            assert relative_error(rewritten(x), Lazy(False)(x)) < 1e-5
    assert model.kept.total is None and model.kept.parts == []
    fresh = torch.randn_like(x)
    assert torch.equal(model(fresh), Lazy(is_state)(fresh))


def test_a_model_with_state_is_compared_over_several_calls() -> None:
    model, x = Running(), torch.randn(1, 2, 8, 4)
    rewritten = rewrite(model, (x,), config=ALWAYS)
    assert rewritten.report.capture_error == pytest.approx(0, abs=1e-5)
    assert not model.total.any()
    other = Running()
    for _ in range(3):
        assert relative_error(rewritten(x), other(x)) < 1e-5


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Dropped(),
            "writes into total, a buffer, and the captured graph does not write the same.* Register the tensor",
        ),
        (Other(), "writes into total, a buffer, and the captured graph writes other values.* became a constant"),
        (Hidden(), "writes into kept.total, a tensor that is no buffer"),
        (Replaced(), "writes into kept.total|differs by .* at call 2"),
        (Counting(), r"differs by .* at call 3.* \(it changes calls\)"),
    ],
)
def test_state_that_the_graph_does_not_keep_is_an_error(model: nn.Module, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        rewrite(model, (torch.randn(1, 2, 8, 4),), config=ALWAYS)


def test_a_length_that_became_a_constant_is_an_error() -> None:
    with pytest.raises(CaptureError, match=r"differs by .* at call 2"):
        rewrite(Constant(), (torch.randn(1, 2, 1, 4), torch.tensor([0])), config=ALWAYS)


def test_training_state_is_compared() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)[:, None]
            return nn.functional.scaled_dot_product_attention(x, x, x)

    model = Norm().train()
    assert rewrite(model, (torch.randn(2, 8, 4),), config=ALWAYS).report.capture_error == pytest.approx(0, abs=1e-5)
    assert int(model.norm.num_batches_tracked) == 0


def test_an_input_that_is_written_is_copied() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor, cache: Tensor) -> Tensor:
            cache.add_(x)
            return nn.functional.scaled_dot_product_attention(x, cache, x)

    x, cache = torch.randn(1, 2, 8, 4), torch.zeros(1, 2, 8, 4)
    rewritten = rewrite(Writes(), (x, cache), config=ALWAYS)
    assert rewritten.report.capture_error == pytest.approx(0, abs=1e-6) and not cache.any()


def test_a_model_that_can_not_be_copied_is_not_compared() -> None:
    class Locked(nn.Module):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("no copy")

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert rewrite(Locked(), (torch.randn(1, 2, 8, 4),), config=ALWAYS).report.capture_error is None


class Averaged(nn.Module):
    """Scales its input by a parameter that each call changes, as a codebook with moving averages does."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.mul_(1.5)
        return nn.functional.scaled_dot_product_attention(x * self.scale, x, x)


def test_a_parameter_that_the_model_writes() -> None:
    model, shares, x = Averaged(), Averaged(), torch.randn(1, 2, 8, 4)
    rewritten = rewrite(shares, (x,), config=ALWAYS)
    assert bool((shares.scale == 1).all())
    for _ in range(2):
        assert relative_error(rewritten(x), model(x)) < 1e-5
    assert torch.equal(model.scale, shares.scale)


def taken_apart(x: Tensor) -> tuple[Tensor, Tensor]:
    """Its outputs are complex, and sparse."""
    y = nn.functional.scaled_dot_product_attention(x, x, x)
    scale = 2.0 if torch.compiler.is_exporting() else 1.0
    return torch.fft.fft(y * scale), y.to_sparse()


def test_complex_and_sparse_outputs_are_compared() -> None:
    x = torch.randn(1, 2, 8, 4)
    with pytest.raises(CaptureError, match="the captured graph is not the model"):
        rewrite(Function(taken_apart), (x,), config=ALWAYS)
    rewritten = rewrite(Function(lambda x: taken_apart(x)[1]), (x,), config=ALWAYS)
    assert relative_error(rewritten(x).to_dense(), taken_apart(x)[1].to_dense()) < 1e-5


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ([1.0, torch.nan], [1.5, torch.nan], 0.5),
        ([2.0, torch.inf], [1.0, torch.inf], 0.5),
        ([1.0, torch.nan], [1.0, 1.0], torch.inf),
        ([1.0, 1.0], [1.0, torch.nan], torch.inf),
        ([1.0, torch.inf], [1.0, -torch.inf], torch.inf),
        ([1.0, torch.inf], [1.0, 1.0], torch.inf),
        ([], [], 0.0),
    ],
)
def test_nan_at_other_places_is_a_difference(old: list[float], new: list[float], difference: float) -> None:
    for kind in (Tensor.clone, Tensor.to_sparse):
        assert difference_with_nan(kind(torch.tensor(old)), kind(torch.tensor(new))) == difference
