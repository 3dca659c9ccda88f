"""How the ops that read a cache, `flash_prior`, `flash_paged` and `flash_blocks`, run on each device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor

from neuron_attn_rewrite.kernels import vendor
from neuron_attn_rewrite.kernels.reference import Terms
from neuron_attn_rewrite.kernels.vendor.adapter import Launch, nki_jit
from neuron_attn_rewrite.ops import launch, simulated
from neuron_attn_rewrite.ops.arguments import check_devices, check_plain, checked_terms, readable
from neuron_attn_rewrite.ops.blocks import FlashBlocks
from neuron_attn_rewrite.ops.flash_fwd import has_tangent
from neuron_attn_rewrite.ops.paged import FlashPaged
from neuron_attn_rewrite.ops.prior import FlashPrior

Call: TypeAlias = FlashPrior | FlashPaged | FlashBlocks
SHARED = ("scale", "softcap", "sink", "lnc", "band_lower", "band_upper", "bounds")
"""The keyword arguments that have the rules of `flash_fwd`. Not every op has all of them."""


@dataclass(frozen=True)
class CachedOp:
    """One of the ops, by its name and its arguments."""

    name: str
    arguments: type[FlashPrior] | type[FlashPaged] | type[FlashBlocks]

    def fake(self, *tensors: Tensor, **options: Any) -> Tensor:
        """The result without its values."""
        call = self._checked(tensors, options)
        return call.query.new_empty(_result_shape(call))

    def on_cpu(self, *tensors: Tensor, **options: Any) -> Tensor:
        """On the CPU, or the NKI kernel on the simulator."""
        call = self._checked(tensors, options)
        if readable(*tensors):
            call.check_values()
        if (target := simulated.simulating()) is not None and call.query.numel():
            result: Tensor = simulated.run(call.launch(target), target)[0]
            return result
        return call.on_cpu()

    def decomposed(self, *tensors: Tensor, **options: Any) -> Tensor:
        """As plain torch operators."""
        return self._checked(tensors, options).decomposed()

    def on_xla(self, *tensors: Tensor, **options: Any) -> Tensor:
        """On XLA tensors."""
        call = self._checked(tensors, options)
        return launch.on_xla(
            self.name,
            tensors,
            options,
            result=_result_shape(call),
            launched=lambda: self.on_device(*tensors, **options),
            decomposed=call.decomposed,
        )

    def with_gradients(self, *tensors: Tensor, **options: Any) -> Tensor:
        """While autograd records. Gradients are those of `flash_fwd` with all keys as one tensor."""
        given = [value for value in (*tensors, *options.values()) if isinstance(value, Tensor)]
        records = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
        call = self._checked(tensors, options) if records or any(map(has_tangent, given)) else None
        if call is not None and not isinstance(call, FlashPaged):
            if readable(*tensors):
                call.check_values()
            query, key, value, terms = call.as_one()
            named = {field.name: getattr(terms, field.name) for field in fields(terms)}
            result: Tensor = torch.ops.neuron_attn.flash_fwd.default(query, key, value, lnc=call.lnc, **named)
            return result
        with torch._C._AutoDispatchBelowAutograd():
            return self._again(tensors, options)

    def in_autocast(self, device: str, key_set: Any, *tensors: Tensor, **options: Any) -> Tensor:
        """Under autocast. Only operands of different dtypes are cast."""
        floats = [isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in tensors]
        kinds = {tensor.dtype for tensor, is_float in zip(tensors, floats, strict=True) if is_float}
        if len(kinds - {torch.float64}) > 1:
            to = torch.get_autocast_dtype(device)
            tensors = tuple(t.to(to) if is_float else t for t, is_float in zip(tensors, floats, strict=True))
        with torch._C._ExcludeDispatchKeyGuard(key_set):
            return self._again(tensors, options)

    def _again(self, tensors: tuple[Tensor, ...], options: Mapping[str, Any]) -> Tensor:
        """The op, below the dispatch key that is being handled."""
        result: Tensor = getattr(torch.ops.neuron_attn, self.name).default(*tensors, **options)
        return result

    def on_device(self, *tensors: Tensor, launcher: Launch = nki_jit, **options: Any) -> Tensor:
        """By the kernel that was chosen."""
        call = self._checked(tensors, options)
        kernel = getattr(call, "kernel_name", self.name)
        if kernel == self.name:
            return launch.run(call.launch(launch.generation()), launcher)
        if isinstance(call, FlashPrior):
            return call.by(vendor.require(kernel))
        terms = Terms(call.scale, softcap=call.softcap, sink=call.sink)
        result: Tensor = vendor.require(kernel).call(*tensors, terms, call.lnc)
        return result

    def _checked(self, tensors: tuple[Tensor, ...], options: Mapping[str, Any]) -> Call:
        call = self.arguments(*tensors, **options)
        needed = [f.name for f in fields(call) if f.default is MISSING and f.name not in SHARED]
        check_plain(self.name, **{name: getattr(call, name) for name in needed})
        shared = {name: getattr(call, name) for name in SHARED if hasattr(call, name)}
        checked_terms(call.query, call.key, call.value, op=self.name, **shared)
        others = {field.name: getattr(call, field.name) for field in fields(call)}
        operands = {name: t for name, t in others.items() if isinstance(t, Tensor)}
        check_plain(self.name, **operands)
        check_devices(self.name, call.query, operands)
        call.check()
        return call


def _result_shape(call: Call) -> tuple[int, ...]:
    return (*call.query.shape[:3], call.value.shape[3])
