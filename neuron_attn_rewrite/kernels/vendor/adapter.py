"""Adapters: how a kernel of the SDK is found and called."""

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
"""Takes the kernel and the number of physical cores. Gives a function of the kernel's arguments."""


@dataclass(frozen=True)
class How:
    """How a call runs. It does not change the result."""

    lnc: int = 1
    """Physical cores."""
    strategy: str = FlashAttentionStrategy.UNSHARDED_KERNEL.name
    orders: Orders = AS_GIVEN


@dataclass(frozen=True, eq=False)
class TwoSources:
    """The operands of `flash_prior`, and what its rows see."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_prior: Tensor
    value_prior: Tensor
    lengths: Tensor
    """Int [1 | batch]: how many keys of the cache are used."""
    window: int | None
    terms: Terms
    """Those of one attention, whose keys are the cache and then the new ones."""


@dataclass(frozen=True)
class Adapter:
    """One kernel of the SDK: where it is imported from, how it is launched, and how its arguments are made."""

    name: str
    places: tuple[str, ...]
    """`module:attribute`, newest release first."""
    needs: str
    """The parameters that the kernel must have, separated by blanks."""
    launch: Launch
    run: Callable[..., Any]
    """The function that calls the kernel. Its first argument is the adapter."""
    behind: Callable[[Adapter, TwoSources, int], Tensor] | None = None
    """The function that computes `flash_prior` by the kernel. The last argument is the number of physical cores."""
    forward: Adapter | None = None
    """For a backward kernel: the forward kernel that computes its output and log-sum-exp."""
    accepts: Accepted = ACCEPTS_PLAIN
    """The orders of operands and result that the kernel takes."""
    kernel: Any = None
    """The installed kernel, set by `resolve`."""
    parameters: frozenset[str] = frozenset()
    """The parameters of the installed kernel. They decide what it can do, not the release number."""

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

        Operands in an order that the kernel does not take are transposed. Nothing is checked here: the clauses in
        `strategy.legality` have refused what the kernel can't compute.
        """
        here = self.accepts.nearest(how.orders)
        operands = how.orders.to(here, query, key, value)
        out: Tensor = self.run(self, *operands, terms, replace(how, orders=here))
        return turned(out, here.result, how.orders.result).contiguous()

    def attend_behind(self, sources: TwoSources, lnc: int) -> Tensor:
        """Compute `flash_prior` by the kernel. As `attend`, nothing is checked here."""
        assert self.behind is not None
        return self.behind(self, sources, lnc).contiguous()

    def call(self, *operands: Any) -> Any:
        """Compute another op. Its operands are those in `torch.ops.neuron_attn`, the terms, and the physical cores."""
        return self.run(self, *operands)

    def launched_by(self, launch: Launch) -> Adapter:
        """The adapter with another way to launch `nki` kernels. Kernels of older generations keep their own."""
        forward = self.forward and self.forward.launched_by(launch)
        return replace(self, launch=launch if self.launch is nki_jit else self.launch, forward=forward)

    def __call__(self, lnc: int, **arguments: Any) -> Any:
        """Launch the kernel. All arguments are keywords, because their positions change between releases."""
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
    """Names of the parameters. If a decorator hides the function, those of the function inside."""
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
    """neuronxcc up to SDK 2.28: kernels without public source. The output is an argument. One core needs no grid."""
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
