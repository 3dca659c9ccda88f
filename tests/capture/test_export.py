"""From models to flat graphs: what is inlined, flattened, functionalised and moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_attn_rewrite import CaptureError, InputError, explain, rewrite
from neuron_attn_rewrite.capture.export import capture
from neuron_attn_rewrite.graph.nodes import mutates, op_name
from tests.helpers import Function


def names(model: nn.Module, *args: Any) -> list[str]:
    return [op_name(node) for node in capture(model, args).module.graph.nodes]


def same(model: nn.Module, *args: Any) -> bool:
    captured = capture(model, args).module
    return torch.equal(captured(*args), model(*args))


def test_no_grad_regions_are_inlined_and_stay_without_gradient() -> None:
    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * 2
        return x + y

    x = torch.ones(3, requires_grad=True)
    captured = capture(Function(f), (x,)).module
    assert "detach" in names(Function(f), x)
    captured(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(3))  # type: ignore[arg-type]


def test_vmap_becomes_plain_dims() -> None:
    def f(x: Tensor) -> Tensor:
        inner = torch.vmap(lambda i, j: (i <= j) & (x.sum() > 0), (None, 0))
        return torch.vmap(inner, (0, None))(torch.arange(3), torch.arange(4))

    found = names(Function(f), torch.ones(3))
    assert not [name for name in found if "vmap" in name or "batch_dim" in name]
    assert same(Function(f), torch.ones(3))


def fill(x: Tensor) -> Tensor:
    y = torch.zeros(4)
    y.fill_(2.0)
    return x + y


def write_slice(x: Tensor) -> Tensor:
    y = torch.zeros(4, 4)
    y[1:3] = x
    return y * 2


def write_slice_of_slice(x: Tensor) -> Tensor:
    y = torch.zeros(4, 4)
    row = y[2]
    row[1:3].add_(x[:2])
    return y + row


def write_into_a_clone(x: Tensor) -> Tensor:
    y = x.clone()
    y.masked_fill_(x > 0, -1.0)
    return y


def fill_what_a_cast_kept(x: Tensor) -> Tensor:
    y = torch.zeros(4)
    y.float().fill_(2.0)
    return x + y


def fill_what_a_cast_copied(x: Tensor) -> Tensor:
    y = torch.zeros(4)
    y.double().fill_(2.0)
    return x + y


def write_into_what_a_reshape_read(x: Tensor) -> Tensor:
    y = x[:, None] * x
    viewed, copied = y.reshape(-1), y.mT.reshape(-1)
    y.mul_(2)
    return viewed + copied


def write_into_what_was_made_contiguous(x: Tensor) -> Tensor:
    y = x[:, None] * x
    viewed, copied = y.contiguous(), y.mT.contiguous()
    y.mul_(2)
    return viewed + copied


CASTS = [fill_what_a_cast_kept, fill_what_a_cast_copied]
COPIES = [write_into_what_a_reshape_read, write_into_what_was_made_contiguous]


@pytest.mark.parametrize("function", [*CASTS, *COPIES, fill, write_slice, write_slice_of_slice, write_into_a_clone])
def test_writes_into_intermediates_become_values(function: Any) -> None:
    x = torch.randn(4)
    captured = capture(Function(function), (x,)).module
    assert not [node for node in captured.graph.nodes if mutates(node)]
    assert same(Function(function), x)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x + self.count


def test_writes_into_buffers_are_effects_and_stay() -> None:
    model = Counter()
    captured = capture(model, (torch.ones(1),)).module
    assert model.count == 0
    captured(torch.ones(1))
    assert model.count == 1


def test_devices_follow_the_input() -> None:
    captured = capture(Function(lambda x: x + torch.arange(4)), (torch.ones(4),)).module
    baked = [a for n in captured.graph.nodes for a in (*n.args, *n.kwargs.values()) if isinstance(a, torch.device)]
    assert not baked


def test_constants_are_buffers_and_not_in_the_state_dict() -> None:
    captured = capture(Function(lambda x: x + torch.tensor([1.0, 2.0])), (torch.ones(2),)).module
    assert len(list(captured.buffers())) == 1
    assert not captured.state_dict()


def test_every_node_has_a_shape() -> None:
    captured = capture(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (torch.randn(2, 5, 16),)).module
    tensors = [n for n in captured.graph.nodes if n.op in ("call_function", "get_attr") and op_name(n) != "getattr"]
    assert all("val" in node.meta for node in tensors)


def test_dynamo_is_the_second_try() -> None:
    """Tracing with example tensors can't go through numpy; Dynamo can."""
    assert same(Function(lambda x: torch.as_tensor(x.numpy() * 2) + 1), torch.ones(3))


def test_what_no_tracer_takes_is_one_clear_error() -> None:
    model = Function(lambda x: x * 2 if x.sum() > 0 else x)
    with pytest.raises(CaptureError, match=r"(?s)could not be captured.*torch\.export:.*Dynamo.*Try:"):
        capture(model, (torch.ones(3),))


class Shared(nn.Module):
    """Reads a weight and two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.weight * 4 + x * 2 + y


def test_inputs_that_are_one_tensor_in_the_example_stay_apart() -> None:
    model, x, y = Shared(), torch.randn(3), torch.randn(3)
    for example in ((x, x), (model.weight, x)):
        captured = capture(model, example).module
        assert torch.equal(captured(x, y), model(x, y))


def test_a_branch_on_inputs_that_are_one_tensor_is_not_taken() -> None:
    """nn.MultiheadAttention projects one tensor once."""
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    rewritten = rewrite(attention, (x, x, x), {"need_weights": False})
    others = tuple(torch.randn(2, 5, 8) for _ in range(3))
    assert torch.allclose(
        rewritten(*others, need_weights=False)[0], attention(*others, need_weights=False)[0], atol=1e-5
    )


@torch.library.custom_op("test_capture::fragile", mutates_args=())
def fragile(x: Tensor) -> Tensor:
    raise RuntimeError("no such thing")


@fragile.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_what_is_captured_and_does_not_run_is_one_clear_error() -> None:
    model = Function(lambda x: F.scaled_dot_product_attention(x, x, fragile(x)))
    with pytest.raises(CaptureError, match=r"(?s)does not run on the example inputs: RuntimeError: no such.*submodule"):
        rewrite(model, (torch.ones(1, 2, 8, 4),))


class Looks(nn.Module):
    """Looks up its tokens, one further, and its positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 8)
        self.register_buffer("places", torch.randn(1, 32, 8))

    def forward(self, ids: Tensor, positions: Tensor, after: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places[:, positions] + self.tokens.weight.index_select(0, after + 1)
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])


@pytest.mark.parametrize(
    ("changed", "value", "words"),
    [
        (
            0,
            10,
            r"argument 'ids' holds 10, .* the table 'tokens.weight', which has 10 entries: only 0 to 9 are allowed",
        ),
        (0, -1, r"argument 'ids' holds -1, .* only 0 to 9 are allowed"),
        (1, 32, r"argument 'positions' holds 32, .* which has 32 entries: only -32 to 31 are allowed"),
        (2, 9, r"computed from 'after' is 10, .* only 0 to 9 are allowed there. Pass other example inputs"),
        (1, -32, ""),
        (0, 9, ""),
    ],
)
def test_an_index_out_of_range_is_named(changed: int, value: int, words: str) -> None:
    inputs = [torch.arange(8)[None], torch.arange(8), torch.arange(8)]
    inputs[changed].view(-1)[3] = value
    if not words:
        assert rewrite(Looks(), tuple(inputs)).report.sites
        return
    for way in (lambda: rewrite(Looks(), tuple(inputs)), lambda: explain(Looks(), *inputs)):
        with pytest.raises(InputError, match=words):
            way()


def test_sizes_that_a_model_makes_numbers_of() -> None:
    model, length = Function(lambda x: x * torch.ones(int(x.shape[0]) // 2 * 2)), torch.export.Dim("length", max=8)
    with pytest.raises(CaptureError, match=r"(?s)could not be captured.*Try: open every size .*or leave fewer open"):
        capture(model, (torch.ones(4),), dynamic_shapes=(({0: length},),))


class Named(nn.Module):
    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return x * scale


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), None, "needs example inputs"),
        ((torch.ones(1),), None, r"do not fit Named\.forward"),
        ((torch.ones(1),), {"scal": torch.ones(1)}, r"do not fit Named\.forward"),
        ("text", None, "args must be a tuple"),
        ((torch.ones(1),), ["scale"], "kwargs must be a dict"),
    ],
)
def test_wrong_example_inputs(args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        capture(Named(), args, kwargs)


def test_what_is_no_model() -> None:
    with pytest.raises(InputError, match=r"model must be an nn\.Module"):
        capture(lambda x: x, (torch.ones(1),))  # type: ignore[arg-type]


def test_data_is_read_as_a_detached_tensor() -> None:
    model = nn.Linear(4, 4)
    model.forward = lambda x: F.linear(x.data, model.weight.data * 2.0)  # type: ignore[method-assign]
    captured, x = capture(model, (torch.randn(3, 4),)).module, torch.randn(3, 4)
    assert torch.equal(captured(x), model(x)) and not captured(x).requires_grad
    assert isinstance(torch.Tensor.data, type(torch.Tensor.grad_fn))


def assigned_data(x: Tensor) -> Tensor:
    y = x * 1.0
    y.data = x * 2.0
    return y


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (assigned_data, "assigns to .data"),
        (torch.func.grad(lambda x: (x * x).sum()), "constant without values|AssertionError"),
    ],
)
def test_what_torch_export_would_leave_out(function: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(Function(function), (torch.randn(4),))


class Held(nn.Module):
    """Writes into tensors that are no buffers, or that it holds twice."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.plain, self.listed = torch.zeros(3), [self.count]

    def forward(self, x: Tensor) -> Tensor:
        self.listed[0].add_(1.0)
        return x + self.plain.add_(1.0) * self.count


def test_a_capture_writes_nothing() -> None:
    model, x = Held(), torch.ones(3)
    captured = capture(model, (x,)).module
    assert model.count == 0 and bool((model.plain == 0).all())
    assert torch.equal(captured(x), Held()(x))


def branching(x: Tensor) -> Tensor:
    return x * 2.0 if x.sum().item() > 0 else x


def test_the_line_that_needs_a_value_is_named() -> None:
    with pytest.raises(
        CaptureError, match=r"At test_export\.py:\d+ in branching, the model needs the value of a tensor"
    ):
        capture(Function(branching), (torch.ones(4),))


def test_a_number_is_that_of_the_time_when_it_was_read() -> None:
    def late(x: Tensor) -> Tensor:
        y = x[0] * 1.0
        number = y.item()
        y.mul_(3.0)
        return x * number + y

    captured = capture(Function(late), (torch.ones(4),)).module
    x = torch.randn(4)
    assert torch.equal(captured(x), late(x))
    assert not captured.graph.find_nodes(op="call_function", target=torch.ops.aten.item.default)
