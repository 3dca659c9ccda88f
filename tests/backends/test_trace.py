"""torch_neuronx.trace: what is handed to it, and the check of what it will lower.

What needs torch_xla runs in processes of its own: its state, and an abort in it, are the process's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_attn_rewrite import InputError, RewriteConfig, TraceCheck, TraceError, rewrite_for_trace, verify_trace
from neuron_attn_rewrite.backends import activations, trace
from neuron_attn_rewrite.kernels import reference
from neuron_attn_rewrite.kernels.nki import prepare
from neuron_attn_rewrite.kernels.orders import AS_GIVEN, Orders
from neuron_attn_rewrite.kernels.vendor import sdk
from neuron_attn_rewrite.kernels.vendor.adapter import How
from neuron_attn_rewrite.ops import launch, torch_neuron
from neuron_attn_rewrite.ops.arguments import checked_terms
from tests.helpers import ALWAYS, relative_error
from tests.models import FAMILIES

ROOT = Path(__file__).parents[2]
needs_xla = pytest.mark.skipif(find_spec("torch_xla") is None, reason="torch-xla is not installed")


def in_process(script: str, *arguments: str) -> dict[str, Any]:
    """The JSON object that a script in tests/backends/xla prints last."""
    environment = {**os.environ, "PJRT_DEVICE": "CPU", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"tests.backends.xla.{script}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
        q, k, v = (t.view(2, 10, 4, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        shown = None if attention_mask is None else attention_mask[:, None, None].bool()
        y = F.silu(F.scaled_dot_product_attention(q, k, v, attn_mask=shown))
        return {"y": y, "none": None, "p": y.softmax(-1), "g": F.gelu(y, approximate="tanh")}


def example() -> tuple[Tensor, Tensor]:
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[0, 7:] = 0
    return torch.randn(2, 10, 32), mask


@pytest.mark.parametrize("how", ["tuple", "dict", "tensor"])
def test_outputs_are_tensors_and_inputs_are_positional(how: str) -> None:
    model, (x, mask) = Block().eval(), example()
    inputs: Any = {"tuple": (x, mask), "dict": {"attention_mask": mask, "x": x}, "tensor": x}[how]
    rewritten = rewrite_for_trace(model, inputs, ALWAYS)
    assert len(rewritten.report.replaced) == 1
    call = (x,) if how == "tensor" else (x, mask)
    traced = torch.jit.trace(rewritten, call, strict=False)
    expected = model(*call)
    for got in (rewritten(*call), traced(*call)):
        assert list(got) == ["y", "p", "g"]
        assert all(relative_error(got[key], expected[key]) < 2e-5 for key in got)


def test_nested_outputs() -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor) -> Any:
            y = F.scaled_dot_product_attention(x, x, x)
            return [y, None], {"all": (x + 1, None, {"y": y})}

    x = torch.randn(1, 2, 8, 4)
    got = rewrite_for_trace(Nested(), x, ALWAYS)(x)
    assert type(got) is tuple and type(got[0]) is list and len(got[0]) == 1
    assert torch.equal(got[1]["all"][0], x + 1) and torch.equal(got[1]["all"][1]["y"], got[0][0])


def test_a_model_output_becomes_a_dict() -> None:
    family = next(f for f in FAMILIES if f.name == "bert")
    model, call = family.build("sdpa"), family.call("right")
    rewritten = rewrite_for_trace(model, call, RewriteConfig(policy="always", require="all"))
    got = rewritten(*call.values())
    assert type(got) is dict and list(got) == ["last_hidden_state", "pooler_output"]
    exported = torch.export.export(rewritten, tuple(call.values()), strict=False).module()
    assert torch.equal(exported(*call.values())["pooler_output"], got["pooler_output"])
    assert rewritten.state_dict().keys() == model.state_dict().keys()


def test_activations_are_called_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch_neuronx replaces functions of torch.nn.functional, before or after the capture."""
    model, inputs = Block().eval(), example()
    rewritten = rewrite_for_trace(model, inputs, ALWAYS)
    seen = []
    for name in ("silu", "gelu", "softmax"):
        original = getattr(F, name)

        def replaced(*args: Any, original: Any = original, name: str = name, **kwargs: Any) -> Tensor:
            seen.append(name)
            return original(*args, **kwargs)  # type: ignore[no-any-return]

        monkeypatch.setattr(F, name, replaced)
    got = rewritten(*inputs)
    assert sorted(seen) == ["gelu", "silu", "softmax"]
    monkeypatch.undo()
    assert relative_error(got["g"], model(*inputs)["g"]) < 2e-5


def test_restored_activations_compute_the_same() -> None:
    x = torch.randn(3, 5).half()
    for op, args in (
        (torch.ops.aten.silu.default, (x,)),
        (torch.ops.aten.gelu.default, (x,)),
        (torch.ops.aten.softmax.int, (x, -1, torch.float32)),
        (torch.ops.aten._softmax.default, (x, -1, False)),
    ):
        assert torch.equal(activations.RESTORED[op](*args), op(*args))
    assert torch.equal(activations.gelu(x, approximate="tanh"), torch.ops.aten.gelu.default(x, approximate="tanh"))


def test_bad_input() -> None:
    with pytest.raises(InputError, match="example_inputs must be a tensor, a tuple or a dict of tensors, not int"):
        rewrite_for_trace(Block(), 3)  # type: ignore[arg-type]


def test_without_torch_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "find_spec", lambda name: None)
    with pytest.raises(TraceError, match=r"verify_trace needs torch-xla: pip install torch-xla"):
        verify_trace(Block(), example())


def test_what_a_check_says() -> None:
    good = TraceCheck((), (), (), 2, 2, (), 1e-7, 1e-3)
    assert not good.problems and "2 NKI custom calls" in str(good)
    bad = TraceCheck(("x",), ("w",), ("aten::nonzero",), 1, 2, ("f32[2,4,64,64]",), float("nan"), 1e-3)
    assert len(bad.problems) == 6
    assert "input x vanished" in str(bad) and "aten::nonzero ran on the CPU" in str(bad)


# The launch


def operands() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(1, 4, 16, 8), torch.randn(1, 2, 16, 8), torch.randn(1, 2, 16, 8)


def test_the_kernel_object_launches_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for `nki`: our kernel is jitted, launched on its cores, and gets keyword arguments."""
    query, key, value = operands()
    terms = checked_terms(query, key, value, scale=0.5, band_upper=0)
    kernel, calls = object(), []

    def launched(**arguments: Any) -> Tensor:
        calls.append(arguments)
        return reference.attention(query, key, value, terms)

    def prepared(q: Tensor, k: Tensor, v: Tensor, given: Any, *, lnc: int, target: str, orders: Orders) -> Any:
        assert orders == AS_GIVEN
        calls.append((given, lnc, target))
        return SimpleNamespace(
            module="stand_in_flash", kernel="flash_fwd", tensors={"q": q}, static={"lo": 1}, lnc=lnc, finish=lambda x: x
        )

    flash = ModuleType("stand_in_flash")
    flash.flash_fwd = kernel  # type: ignore[attr-defined]
    monkeypatch.setattr(launch.prepare, "flash_fwd", prepared)
    monkeypatch.setitem(sys.modules, "stand_in_flash", flash)
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn3")
    wrapped: list[Any] = []

    def launcher(given: Any, lnc: int) -> Any:
        wrapped.append((given, lnc))
        return launched

    out = launch.launch(query, key, value, terms, "flash_fwd", How(2), launcher)
    assert relative_error(out, reference.attention(query, key, value, terms)) == 0
    assert wrapped == [(kernel, 2)] and calls == [(terms, 2, "gen4"), {"q": query, "lo": 1}]


def test_empty_packages_are_not_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not sdk.has("no_such_package", "trace")
    assert not sdk.has("json", "trace") and sdk.has("json", "loads")
    monkeypatch.setitem(sys.modules, "nki", ModuleType("nki"))
    assert not sdk.has("nki", "jit")


@torch.library.custom_op("neuron_attn_test::inner", mutates_args=())
def inner(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    terms = checked_terms(query, key, value, scale=scale)
    return reference.attention(query, key, value, terms)


@inner.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


def test_the_op_dissolves_into_the_kernels_own_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """As TorchNeuron's `wrap_nki` needs it, with an op in place of its node. Autograd is ours."""
    from torch._dynamo.backends.common import aot_autograd

    def fake_launch(query: Tensor, key: Tensor, value: Tensor, terms: Any, kernel: str, how: How, launcher: Any) -> Any:
        return launcher("flash", how.lnc)(query=query, key=key, value=value, scale=terms.scale)

    class Wrapped:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            assert grid == (2,)
            return inner

    monkeypatch.setattr(launch, "launch", fake_launch)
    graphs: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.ops.neuron_attn.flash_fwd(query, key, value, scale=0.5, lnc=2) * 2

    given = [t.requires_grad_() for t in operands()]
    expected = torch.autograd.grad(call(*given).sum(), given)
    torch._dynamo.reset()
    compiled = torch.compile(call, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    with torch_neuron.dissolved(lambda kernel: Wrapped()):
        got = torch.autograd.grad(compiled(*given).sum(), given)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert targets.count("neuron_attn_test.inner.default") == 1
    assert not [target for target in targets if "flash_" in target]
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(got, expected, strict=True))
    torch._dynamo.reset()
    graphs.clear()
    torch.compile(call, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))(*given)
    assert any("flash_fwd" in str(node.target) for node in graphs[0].graph.nodes)


@torch.library.custom_op("neuron_attn_test::rows", mutates_args=())
def rows(query: Tensor, like: list[int]) -> Tensor:
    return query.new_zeros(like)


@rows.register_fake
def _(query: Tensor, like: list[int]) -> Tensor:
    return query.new_empty(like)


@pytest.mark.parametrize(
    "terms", [{"band_upper": 0}, {"band_upper": 0, "empty_rows": "mean"}, {"bounds": True}, {"bias": True}], ids=str
)
def test_our_own_kernel_dissolves_with_the_plan_it_has_outside_a_trace(
    terms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.backends.common import aot_autograd

    kernels = ModuleType("kernels")
    kernels.flash_fwd = "ours"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "neuron_attn_rewrite.kernels.nki.flash", kernels)
    query, key, value = (torch.randn(2, heads, 300, 16) for heads in (4, 2, 2))
    given = {name: v for name, v in terms.items() if v is not True}
    tensors = {
        "bounds": torch.tensor([0, 200], dtype=torch.int32).expand(1, 300, 2).contiguous(),
        "bias": torch.randn(1, 1, 300, 300),
    }
    given |= {name: tensors[name] for name, v in terms.items() if v is True}
    static: list[dict[str, Any]] = []

    class Wrapped:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def call(**arguments: Any) -> Tensor:
                static.append({k: v for k, v in arguments.items() if not isinstance(v, Tensor)})
                return rows(arguments["q"], [2 * 4 * 300, 16])

            return call

    def call(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
        return torch.ops.neuron_attn.flash_fwd(query, key, value, scale=0.5, lnc=2, **given)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=aot_autograd(fw_compiler=lambda module, _: module.forward), fullgraph=True)
    with torch_neuron.dissolved(lambda kernel: Wrapped()), torch.no_grad():
        assert compiled(query, key, value, **given).shape == query.shape
    outside = prepare.flash_fwd(query, key, value, checked_terms(query, key, value, scale=0.5, **given), lnc=2).static
    # What bounds hide is known outside a trace only: within one all tiles are looked at.
    differ = {"tiles", "pairs"} if "bounds" in given else set()
    assert static and {k for k in outside if outside[k] != static[0][k]} == differ


def test_the_example_for_trainium_says_what_is_missing() -> None:
    command = [sys.executable, "examples/trainium.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PJRT_DEVICE": "CPU"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "torch_neuronx is not installed, so nothing is traced" in done.stdout
    lowers = "lowered: 4 NKI custom calls" in done.stdout
    assert lowers if find_spec("torch_xla") else "verify_trace is left out" in done.stdout


# Lowering


@needs_xla
def test_models_lower() -> None:
    """One custom call a layer, no softmax, no buffer of scores, every input read, the numbers of the CPU."""
    for name, seen in in_process("models").items():
        assert seen["problems"] == [], (name, seen)
        assert seen["kernels"] == seen["attentions"] > 0, (name, seen)
        assert seen["exponentials"] == 0, (name, seen)
        assert seen["dots"][0] - seen["dots"][1] == 2 * seen["attentions"], (name, seen)
        assert seen["scores_before"] and not seen["scores_after"], (name, seen)
        assert seen["max_error"] < 1e-5
        assert seen["cpu_again"] == 0.0, (name, "the module on the CPU is as it was")


@needs_xla
def test_hazards_are_seen() -> None:
    """Five ways in which lowering succeeds with a wrong graph, and a device to device way that just works."""
    seen = in_process("hazards")
    assert any("attention_mask vanished" in line for line in seen["baked device"])
    assert any("test_only_cpu" in line for line in seen["op with a CPU kernel only"])
    assert any("aten::_scaled_dot_product_flash_attention_for_cpu" in line for line in seen["fallback"])
    assert any("attention_mask vanished" in line for line in seen["mask that was looked at"])
    assert seen["hashes"]["scale"] and seen["hashes"]["same"]
    assert seen["clean"] == []
    assert any("a buffer" in line for line in seen["scores left"])
    assert seen["bias"] == []
    assert seen["native beside a bias"] == ["a buffer f32[2,12,12] of scores is left"]
    assert any("1 NKI custom calls, but 2" in line for line in seen["lost kernel"])
    lost = "second is aliased, and the lowered graph does not read it: it would lose the alias"
    assert seen["aliases"] == {
        "good": [],
        "none": [],
        "not read": [lost],
        "twice": ["2 tensors are aliased to output 1", lost],
        "too far": ["first is aliased to output 4, and there are 4 outputs"],
        "negative": ["first is aliased to output -1, and there are 4 outputs"],
        "shape": ["first is float32[2, 4], and is aliased to output 0, which is float32[]"],
        "dtype": ["first is float32[2, 4], and is aliased to output 3, which is float64[2, 4]"],
        "foreign": ["a tensor float32[2, 4] is aliased, and is no parameter or buffer of the module"],
    }


@needs_xla
def test_lazy_tensors() -> None:
    """`rewritten.to("xla")` runs as it is: caches in place, constants, training; and every operand of the op."""
    seen = in_process("lazy")
    assert seen.pop("compile with openxla")[0] == 1
    assert all(error < 1e-5 for error in seen.values()), seen
