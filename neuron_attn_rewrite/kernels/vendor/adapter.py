"""What an adapter is: a kernel of the SDK, found by import and signature, and the way to call it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias

from torch import Tensor

from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy
from neuron_attn_rewrite.kernels.orders import ACCEPTS_PLAIN, AS_GIVEN, Accepted, Orders, turned
from neuron_attn_rewrite.kernels.reference import Terms

Launch: TypeAlias = Callable[[Any, int], Callable[..., Any]]
"""(kernel, physical cores) to something that takes the kernel's arguments."""


@dataclass(frozen=True)
class How:
    """What is said of a call beside its operands, and changes no number."""

    lnc: int = 1
    """Physical cores."""
    strategy: str = FlashAttentionStrategy.UNSHARDED_KERNEL.name
    orders: Orders = AS_GIVEN


@dataclass(frozen=True)
class Adapter:
    """One kernel of the SDK: where it may lie, how it is launched, and how an attention becomes its arguments."""

    name: str
    places: tuple[str, ...]
    """`module:attribute`, newest release first."""
    needs: str
    """Parameters without which it is not the kernel that is meant, between blanks."""
    launch: Launch
    run: Callable[..., Any]
    """What `call` does, with the adapter itself before the operands."""
    forward: Adapter | None = None
    """Of a backward kernel: the one whose output and log-sum-exp it starts from."""
    accepts: Accepted = ACCEPTS_PLAIN
    """How operands and result may lie, as the kernel takes them."""
    kernel: Any = None
    """What `resolve` has found."""
    parameters: frozenset[str] = frozenset()
    """Of the kernel that was found: a release is known by what its kernel takes, not by its number."""

    def resolve(self) -> Adapter | None:
        """The adapter of the installed kernel; None if no place has one with the needed parameters."""
        for place in self.places:
            module, attribute = place.split(":")
            kernel = _attribute(module, attribute)
            if kernel is not None:
                parameters, forward = _parameters(kernel), self.forward and self.forward.resolve()
                if parameters.issuperset(self.needs.split()) and (forward or not self.forward):
                    return replace(self, kernel=kernel, parameters=parameters, forward=forward)
        return None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, terms: Terms, how: How) -> Tensor:
        """Compute `flash_fwd` by the kernel, from operands and to a result in the orders of `how`.

        What does not lie as the kernel takes it is turned, at once and once. What the kernel can't compute has been
        refused before, by its clauses in `strategy.legality`; here nothing is checked again.
        """
        here = self.accepts.nearest(how.orders)
        operands = how.orders.to(here, query, key, value)
        out: Tensor = self.run(self, *operands, terms, replace(how, orders=here))
        return turned(out, here.result, how.orders.result).contiguous()

    def call(self, *operands: Any) -> Any:
        """Compute another op: its tensors as in `torch.ops.neuron_attn`, then its terms, then the physical cores."""
        return self.run(self, *operands)

    def launched_by(self, launch: Launch) -> Adapter:
        """The same with another way to launch `nki` kernels; those of older generations keep theirs."""
        forward = self.forward and self.forward.launched_by(launch)
        return replace(self, launch=launch if self.launch is nki_jit else self.launch, forward=forward)

    def __call__(self, lnc: int, **arguments: Any) -> Any:
        """The launch itself: by keyword only, because positions move between releases."""
        return self.launch(self.kernel, lnc)(**arguments)


def _attribute(module: str, attribute: str) -> Any:
    try:
        if find_spec(module.partition(".")[0]) is None:
            return None
        return getattr(import_module(module), attribute, None)
    except (ImportError, ValueError, AttributeError):
        # An empty stand-in for a package has no spec (ValueError) or lacks what a module of ours imports.
        return None


def _parameters(kernel: Any) -> frozenset[str]:
    """Names of the parameters, of the function inside if a decorator hides it."""
    for candidate in (getattr(kernel, "func", None), getattr(kernel, "sign", None), kernel):
        if isinstance(candidate, inspect.Signature):
            return frozenset(candidate.parameters)
        if callable(candidate):
            try:
                names = frozenset(inspect.signature(candidate).parameters)
            except (TypeError, ValueError):
                continue
            if names and not names <= {"args", "kwargs"}:
                return names
    return frozenset()


def own_grid(kernel: Any, lnc: int) -> Callable[..., Any]:
    """Kernels whose grid depends on the shapes: their adapter indexes them."""
    return kernel  # type: ignore[no-any-return]


def nki_jit(kernel: Any, lnc: int) -> Callable[..., Any]:
    """`nki` 0.2 and later: the grid is one number."""
    launched: Callable[..., Any] = import_module("nki").jit(kernel)[lnc]
    return launched


def isa_jit(kernel: Any, lnc: int) -> Callable[..., Any]:
    """neuronxcc up to SDK 2.28: closed kernels, whose output is an argument; on one core without a grid."""
    launched = import_module("torch_neuronx.xla_impl.ops").nki_jit()(kernel)
    return launched[(import_module("neuronxcc.nki.language").nc(lnc),)] if lnc > 1 else launched  # type: ignore[no-any-return]


KV_TILES = (2048, 512)
"""Keys that the first `flash_fwd` kernels take at a time: the number of keys must be a multiple of one of them."""


def flash_config(adapter: Adapter, kv_len: int, **options: Any) -> Any:
    """The `FlashConfig` that lies beside the kernel, with the largest tile that divides the keys."""
    tile = next(tile for tile in KV_TILES if kv_len % tile == 0)
    modules = (getattr(adapter.kernel, "__module__", None), *(place.split(":")[0] for place in adapter.places))
    found = (_attribute(module, "FlashConfig") for module in modules if module)
    return next(config for config in found if config)(seq_tile_size=tile, **options)
