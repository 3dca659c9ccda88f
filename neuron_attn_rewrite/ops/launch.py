"""Launches kernels on a Neuron device, on XLA tensors and on TorchNeuron.

With the Neuron SDK installed, the kernel object launches itself and emits its own custom call, whose payload is private
to `nki` and `neuronx-cc`. Without the SDK the op is plain torch operators. To inspect the HLO on any machine there is a
placeholder: a custom call with the real target, operands and results, which can't be executed.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from neuron_attn_rewrite.errors import KernelError
from neuron_attn_rewrite.hardware import GENERATIONS, TARGETS
from neuron_attn_rewrite.kernels import vendor
from neuron_attn_rewrite.kernels.nki import prepare
from neuron_attn_rewrite.kernels.reference import Terms
from neuron_attn_rewrite.kernels.vendor.adapter import How, Launch, nki_jit
from neuron_attn_rewrite.kernels.vendor.sdk import sdk_is_installed
from neuron_attn_rewrite.masks.spec import Band, Claim, EmptyRows, KeyPadding, Limited, MaskSpec
from neuron_attn_rewrite.problem import AttentionProblem
from neuron_attn_rewrite.strategy.gradients import OPERATORS, gradients

TARGET = "AwsNeuronCustomNativeKernel"
"""The custom call that a NKI kernel is in HLO (AWS Neuron documentation, NKI framework custom operators)."""
PLATFORM = "NEURON_PLATFORM_TARGET_OVERRIDE"

_placeholders: list[bool] = []


@contextmanager
def placeholder_kernels() -> Iterator[None]:
    """Within the block the ops are placeholder custom calls on XLA tensors: look at the HLO, and don't execute it."""
    _placeholders.append(True)
    try:
        yield
    finally:
        _placeholders.pop()


def on_xla(
    kernel: str,
    tensors: Sequence[Tensor],
    options: Mapping[str, Any],
    *,
    result: Sequence[int],
    launched: Callable[[], Tensor],
    decomposed: Callable[[], Tensor],
) -> Tensor:
    """An attention op on XLA tensors.

    Args:
        kernel: what is called.
        tensors: the op's positional operands; the first is the query.
        options: its keyword arguments.
        result: the shape of what it gives.
        launched: launches the kernel of the SDK or of this package.
        decomposed: computes the same in plain torch operators.

    Raises:
        KernelError: the Neuron SDK is here, but not the kernel that was chosen.
    """
    if _placeholders:
        return _placeholder(kernel, tensors, options, tuple(result))
    return launched() if sdk_is_installed() else decomposed()


def launch(
    query: Tensor, key: Tensor, value: Tensor, terms: Terms, kernel: str, how: How, launcher: Launch = nki_jit
) -> Tensor:
    """Run the chosen kernel, ours by the name "flash_fwd" or an adapter's, on operands in the orders of `how`.

    Raises:
        KernelError: it is not installed.
    """
    if kernel != "flash_fwd":
        return vendor.require(kernel).launched_by(launcher).attend(query, key, value, terms, how)
    ours = prepare.flash_fwd(query, key, value, terms, lnc=how.lnc, target=generation(), orders=how.orders)
    return run(ours, launcher)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, terms: Terms, lnc: int, launcher: Launch = nki_jit
) -> tuple[Tensor, ...] | None:
    """Gradients by the first kernel of the SDK that is installed and can compute them; None without one.

    A kernel gives no gradient of a bias: those of query, key, value and sink.
    """
    if _placeholders:
        return None
    name, _ = gradients(problem_of_call(query, key, value, terms), TARGETS[generation()], lnc)
    if name == OPERATORS:
        return None
    grads: tuple[Tensor, ...] = vendor.require(name).launched_by(launcher).call(grad, query, key, value, terms, lnc)
    return grads


def problem_of_call(query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> AttentionProblem:
    """What a call of `flash_fwd` computes. The values of its tensors are not read."""
    q_len, kv_len = query.shape[2], key.shape[2]
    band = Band(terms.band_lower, terms.band_upper)
    claims: list[Claim] = [] if band == Band() else [band]
    if terms.key_padding is not None:
        claims.append(KeyPadding("key_padding"))
    if terms.bounds is not None:
        claims.append(Limited("bounds"))
    known = terms.key_padding is None and terms.bounds is None and band.reaches_every_row(q_len, kv_len)
    return AttentionProblem.of(
        query.shape,
        value.shape,
        query.dtype,
        terms.scale,
        MaskSpec(tuple(claims)),
        bias=None if terms.bias is None else terms.bias.shape,
        softcap=terms.softcap,
        sink=terms.sink is not None,
        empty_rows=EmptyRows.NEVER if known else EmptyRows(terms.empty_rows),
    )


def run(call: prepare.Launch, launcher: Launch = nki_jit) -> Tensor:
    """Launch one of our own kernels.

    Raises:
        KernelError: `nki` is not installed.
    """
    try:
        kernel = getattr(import_module(call.module), call.kernel)
    except ImportError as error:
        raise KernelError(f"the kernel {call.kernel} needs the package nki of the AWS Neuron SDK: {error}.") from error
    result: Tensor = call.finish(launcher(kernel, call.lnc)(**call.tensors, **call.static))
    return result


def generation() -> str:
    """What NKI calls the NeuronCores that kernels are made for."""
    return GENERATIONS.get(os.environ.get(PLATFORM, ""), "gen3")


# The placeholder


@dataclass(frozen=True)
class _Signature:
    """What makes two placeholder calls the same."""

    shapes: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    result: tuple[int, ...]
    config: str


def _placeholder(kernel: str, tensors: Sequence[Tensor], options: Mapping[str, Any], result: tuple[int, ...]) -> Tensor:
    named = {name: value for name, value in options.items() if isinstance(value, Tensor)}
    operands = (*tensors, *named.values())
    config = {
        "placeholder": "neuron_attn_rewrite",
        "func_name": kernel,
        "named_operands": list(named),
        "arguments": {k: v for k, v in options.items() if k not in named and v is not None},
    }
    text = base64.b64encode(json.dumps(config, sort_keys=True).encode()).decode()
    computation, order = _computation(_Signature(tuple((tuple(t.shape), t.dtype) for t in operands), result, text))
    xla: Any = import_module("torch_xla")._XLAC
    out: Tensor = xla._xla_user_computation(f"xla::_op_{kernel}", [operands[i] for i in order], computation)[0]
    return out


@cache
def _computation(signature: _Signature) -> tuple[Any, tuple[int, ...]]:
    """A computation that is one custom call, and which operand is its n-th parameter.

    torch_xla hashes a bare custom call by its target alone, so that two calls with another scale would share a compiled
    graph; a user computation is hashed as a whole.
    """
    torch_xla: Any = import_module("torch_xla")
    builder: Any = import_module("torch_xla.core.xla_builder")
    device = torch_xla.device()
    # Copied from the CPU and not made on the device: only then they are parameters.
    operands = [torch.zeros(shape, dtype=dtype).to(device) for shape, dtype in signature.shapes]
    dtype = signature.shapes[0][1]
    calls = torch_xla._XLAC._xla_custom_call(
        operands, TARGET, [list(signature.result)], [dtype], False, signature.config, 2, {}
    )
    context = torch_xla._XLAC.lowering.LoweringContext("NkiKernelCall.1")
    context.build(calls)
    ids = [context.tensor_parameter_id(operand) for operand in operands]
    order = tuple(sorted(range(len(operands)), key=lambda i: ids[i]))
    return builder.computation_from_module_proto("NkiKernelCall", context.hlo()), order
