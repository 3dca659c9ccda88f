"""The kernels as an attention implementation of transformers, without a graph.

    register_with_transformers()
    model = AutoModel.from_pretrained(..., attn_implementation="neuron_nki")

It works with `generate`, and with continuous batching, `generate_batch` (`backends/continuous.py`).

transformers passes scale, softcap, sinks and masks by name, so only the mask is left to prove. The mask function of the
model is evaluated for each query and key and fitted to claims, like the mask of a graph. Padding stays a vector over
the keys. While a model is captured (torch.export, torch.compile), its graph gets scaled_dot_product_attention.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import neuron_attn_rewrite.ops  # noqa: F401  registers torch.ops.neuron_attn
from neuron_attn_rewrite.backends.continuous import PREFIX, SUFFIX, PagedStep, admit, paged_step
from neuron_attn_rewrite.config.options import RewriteConfig
from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy
from neuron_attn_rewrite.errors import InputError, RewriteError, RewriteWarning
from neuron_attn_rewrite.kernels.orders import Orders
from neuron_attn_rewrite.masks.fit import fit_rows
from neuron_attn_rewrite.masks.spec import Band, EmptyRows, KeyPadding, Limited, MaskSpec
from neuron_attn_rewrite.problem import AttentionProblem
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.report.data import NodeReport, SiteReport
from neuron_attn_rewrite.report.report import RewriteReport
from neuron_attn_rewrite.strategy.choose import NATIVE, Decision, choose
from neuron_attn_rewrite.strategy.legality import OURS as OUR_KERNEL

NAME = "neuron_nki"
OURS = "_neuron_attn_rewrite_registration"
"""The attribute of an attention function that this module registered, with its `Registration`."""
_BUILT_IN = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Names that transformers knows, whether or not it has registered them."""
MASK = "_neuron_attn_rewrite_mask"
"""The attribute of a mask tensor with its `KnownMask`. A slice or a cast of the tensor does not have it."""


@dataclass(frozen=True)
class KnownMask:
    """The parts of a 4-D mask: a pattern that is the same for all batch elements and heads, and padding."""

    pattern: MaskSpec
    padding: Tensor | None
    """Bool [batch, kv_len], True where the key is visible. None without padding."""


@dataclass
class Registration:
    """The result of `register_with_transformers`, which collects a report."""

    config: RewriteConfig
    _sites: dict[object, SiteReport] = field(default_factory=dict)
    _names: WeakKeyDictionary[nn.Module, str] = field(default_factory=WeakKeyDictionary)

    @property
    def report(self) -> RewriteReport:
        """The attentions that were called so far: one site for each layer, shape and mask.

        In continuous batching, where each step has its own shape, one for each layer, with the shape of its first step.
        """
        config = self.config
        return RewriteReport(tuple(self._sites.values()), config.target, config.logical_cores, config.policy, 0, 0)

    def reset(self) -> None:
        """Start a new report."""
        self._sites.clear()
        self._names.clear()

    def name_of(self, module: nn.Module) -> str:
        """The class of the module and its layer index; without one, the number of its first call among its class."""
        if module not in self._names:
            kind = type(module).__name__
            number = getattr(module, "layer_idx", None)
            if number is None:
                number = sum(name.startswith(f"{kind} ") for name in self._names.values())
            self._names[module] = f"{kind} {number}"
        return self._names[module]


def register_with_transformers(config: RewriteConfig | None = None, *, name: str = NAME) -> Registration:
    """Register an attention function and a mask function. Without the second, transformers would drop causal masks.

    The attention function is also registered as `paged|<name>`, and continuous batching takes it: `generate_batch`
    reads the paged cache with `torch.ops.neuron_attn.flash_paged`. A layer that this op can't compute is computed as
    transformers does, from a copy of its keys, with a reason in the report. `policy` has no effect there.

    Args:
        config: see `RewriteConfig`. `verify` and `require` have no effect.
        name: what to pass as `attn_implementation`. A second registration under the same name replaces the first, also
            for models that are built already. With another configuration it warns. Give another name to have both.

    Raises:
        InputError: `name` is empty, or an attention implementation that is not of this package has it.
        RewriteError: transformers is missing, or older than 4.57.
    """
    config = RewriteConfig.of(config)
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"register_with_transformers: name must be a word such as {NAME!r}, not {name!r:.80}.")
    try:
        attention = import_module("transformers").AttentionInterface
        masks = import_module("transformers").AttentionMaskInterface
    except (ImportError, AttributeError) as error:
        raise RewriteError(
            "register_with_transformers needs transformers >= 4.57: pip install 'transformers>=4.57'."
        ) from error
    registration = Registration(config)
    known = attention()
    if name in _BUILT_IN or (name in known and not hasattr(known[name], OURS)):
        raise InputError(
            f"register_with_transformers: name={name!r} is an attention implementation of transformers or of another "
            f"package: choose a name of your own, such as {NAME!r}."
        )
    if name in known and getattr(known[name], OURS).config != config:
        words = f"{name!r} was registered with another configuration: models that use it take the new one from now on."
        warnings.warn(words, RewriteWarning, stacklevel=2)

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        return _attention(registration, module, query, key, value, attention_mask, **options)

    setattr(forward, OURS, registration)
    for known_as in (name, PREFIX + name, name + SUFFIX):
        attention.register(known_as, forward)
    masks.register(name, make_mask)
    admit(lambda implementation: hasattr(attention().get(implementation, None), OURS))
    return registration


def _capturing() -> bool:
    return bool(torch.compiler.is_compiling() or torch._C._get_tracing_state())


def make_mask(*args: Any, **options: Any) -> Tensor | None:
    """The 4-D bool mask of transformers, never None, with its `KnownMask` as an attribute if it could be found."""
    sdpa_mask = import_module("transformers.masking_utils").sdpa_mask
    if _capturing():
        return sdpa_mask(*args, **options)  # type: ignore[no-any-return]
    whole = {**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor = sdpa_mask(*args, **whole)
    given = options.get("attention_mask")
    if given is not None and given.dim() != 2:
        return mask
    pattern = _pattern(sdpa_mask(*args, **{**whole, "attention_mask": None}))
    if pattern is not None:
        start, kv_len = options.get("kv_offset", 0), mask.shape[-1]
        padding = None if given is None else given[:, start : start + kv_len].bool()
        if padding is None or padding.shape[1] == kv_len:
            setattr(mask, MASK, KnownMask(pattern, padding))
    return mask


def _pattern(visible: Tensor) -> MaskSpec | None:
    """The claims that describe `visible`, bool [batch, 1, q_len, kv_len], exactly. None if there are none.

    None also for a tensor whose values can't be read, and if the batch elements differ.
    """
    if type(visible) is not Tensor or visible.device.type != "cpu":
        return None
    one = visible[0, 0]
    q_len, kv_len = one.shape
    if not (visible == one).all():
        return None
    first = one.int().argmax(-1)
    rows = torch.stack([first, first + one.sum(-1)], -1).where(one.any(-1, keepdim=True), 0)
    spec = MaskSpec(fit_rows(rows, kv_len))
    return spec if torch.equal(spec.visible(q_len, kv_len), one) else None


def _attention(
    registration: Registration,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    def native() -> tuple[Tensor, None]:
        shared = {"scaling": scaling, "dropout": dropout, "is_causal": is_causal, **options}
        if position_bias is not None:
            shared["position_bias"] = position_bias
        if softcap is None and s_aux is None:
            sdpa = import_module("transformers.integrations.sdpa_attention").sdpa_attention_forward
            return sdpa(module, query, key, value, attention_mask, **shared)  # type: ignore[no-any-return]
        return _eager(module, query, key, value, attention_mask, {**shared, "softcap": softcap, "s_aux": s_aux})

    cache = options.pop("cache", None)
    if cache is not None:
        step = paged_step(module, cache, options)
        if not _capturing():
            no = "it has a position bias" if position_bias is not None else ""
            no = _unsupported(None, value.shape[2], dropout, options) or no
            out = _paged(registration, step, module, (query, key, value), scaling, softcap, s_aux, no)
            if out is not None:
                return out, None
        key, value = step.update(key, value)
        attention_mask, is_causal = step.mask(query.shape[2], key.shape[2]), False
        return native()
    if _capturing():
        return native()
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    q_len, kv_len = query.shape[2], value.shape[2]
    unsupported = _unsupported(attention_mask, kv_len, dropout, options)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and q_len > 1 and attention_mask is None
    if causal and q_len != kv_len:
        unsupported = unsupported or "there is no mask, and the keys that each query sees are not known"
    known, bias = (None, None) if unsupported else _mask_and_bias(attention_mask, position_bias, kv_len, query.dtype)
    pattern = known.pattern if known else MaskSpec((Band(upper=0),) if causal else ())
    padding = known.padding if known else None
    claims = (*pattern.claims, KeyPadding("attention_mask")) if padding is not None else pattern.claims
    problem = AttentionProblem.of(
        query.shape,
        value.shape,
        query.dtype,
        scale,
        MaskSpec(claims),
        bias=None if bias is None else bias.shape,
        softcap=softcap,
        sink=s_aux is not None,
        empty_rows=EmptyRows.NEVER if padding is None and bias is None else EmptyRows.ZERO,
    )
    name = registration.name_of(module)
    decision = _native(unsupported, registration.config) if unsupported else choose(problem, registration.config, name)
    site = _site(name, problem, decision)
    registration._sites.setdefault(site, site)
    if decision.kernel == NATIVE:
        return native()
    band, row_bounds = problem.mask.band, problem.mask.row_bounds
    bounds = row_bounds.rows(q_len, kv_len)[None].int().to(query.device) if row_bounds.claims else None
    out = torch.ops.neuron_attn.flash_fwd(
        query,
        key,
        value,
        scale=scale,
        band_lower=band.lower,
        band_upper=band.upper,
        key_padding=padding,
        bounds=bounds,
        bias=bias,
        softcap=softcap,
        sink=s_aux,
        strategy=decision.strategy.name,
        lnc=decision.lnc,
        kernel_name=decision.kernel,
        orders=str(Orders(result="BSHD")),
    )
    return out, None


def _paged(
    registration: Registration,
    step: PagedStep,
    module: nn.Module,
    operands: tuple[Tensor, Tensor, Tensor],
    scaling: float | None,
    softcap: float | None,
    sink: Tensor | None,
    unsupported: str,
) -> Tensor | None:
    """A layer of continuous batching by `flash_paged`, [1, q_len, num_heads, v_head_dim]; None if it can't compute it.

    The new keys and values are written into the cache then. The op reads those from before.
    """
    query, key, value = operands
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    config, name = registration.config, registration.name_of(module)
    problem = AttentionProblem.of(
        query.shape,
        value.shape,
        query.dtype,
        scale,
        MaskSpec((Limited("key <= query of the same request"),)),
        softcap=softcap,
        sink=sink is not None,
    )
    no = unsupported or step.why_not(key, value)
    if not no and config.kernels and OUR_KERNEL not in config.kernels:
        no = f"only {OUR_KERNEL} has a form for a cache in blocks, and config.kernels leaves it out"
    ours = replace(config, policy="always", kernels=(OUR_KERNEL,))
    decision = _native(no, config) if no else choose(problem, ours, name)
    if decision.kernel != NATIVE:
        in_place = Reason("cache-in-blocks", "the blocks of the cache are read in place, without a copy of their keys")
        decision = replace(decision, kernel="flash_paged", reasons=(in_place,))
    registration._sites.setdefault((name, decision), _site(name, problem, decision))
    if decision.kernel == NATIVE:
        return None
    assert step.blocks is not None
    schedule = step.schedule(query.shape[2])
    key_cache, value_cache = (blocks.transpose(1, 2) for blocks in step.blocks)
    tiles = (getattr(schedule, field.name).to(query.device) for field in fields(schedule))
    out: Tensor = torch.ops.neuron_attn.flash_paged(
        query, key, value, key_cache, value_cache, *tiles, scale=scale, softcap=softcap, sink=sink, lnc=decision.lnc
    )
    step.write(key, value)
    return out.transpose(1, 2)


def _native(reason: str, config: RewriteConfig) -> Decision:
    none = FlashAttentionStrategy.NONE
    return Decision(none, NATIVE, config.logical_cores, (Reason("no-kernel-call", reason),))


def _unsupported(mask: Tensor | None, kv_len: int, dropout: float, options: dict[str, Any]) -> str:
    """Why no kernel can be called; "" if one may be."""
    if dropout:
        return "dropout is active"
    if options.get("output_attentions") or options.get("head_mask") is not None:
        return "the attention weights are returned, or heads are masked"
    if mask is not None and (mask.dim() != 4 or mask.shape[-1] < kv_len):
        return f"the mask has the shape {list(mask.shape)}, not [batch, heads, queries, keys]"
    return ""


def _mask_and_bias(
    mask: Tensor | None, position_bias: Tensor | None, kv_len: int, dtype: torch.dtype
) -> tuple[KnownMask | None, Tensor | None]:
    """The `KnownMask` of a mask, and the dense bias for the kernel: [.., q_len, kv_len], or None."""
    known: KnownMask | None = getattr(mask, MASK, None)
    bias = position_bias
    if mask is not None and known is None:
        mask = mask[..., :kv_len]
        if mask.dtype == torch.bool:
            mask = torch.zeros((), dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
        bias = mask if bias is None else mask + bias
    return known, bias


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, None]:
    """Call the eager attention of the model itself, which supports softcap and sinks.

    Raises:
        RewriteError: the model has none.
    """
    eager: Callable[..., Any] | None = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise RewriteError(
            f"{type(module).__name__} has softcap or sinks. No kernel computes this call, and the model has no eager "
            "attention that could."
        )
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros((), dtype=query.dtype, device=mask.device).masked_fill(~mask, torch.finfo(query.dtype).min)
    given = {name: value for name, value in options.items() if value is not None}
    return eager(module, query, key, value, mask, **given)[0], None


def _site(name: str, problem: AttentionProblem, decision: Decision) -> SiteReport:
    taken, op = decision.kernel != NATIVE, "flash_paged" if decision.kernel == "flash_paged" else "flash_fwd"
    return SiteReport(
        name,
        f'attn_implementation="{NAME}"',
        batch=problem.batch,
        num_heads=problem.num_heads,
        num_kv_heads=problem.num_kv_heads,
        q_len=problem.q_len,
        kv_len=problem.kv_len,
        head_dim=problem.head_dim,
        v_head_dim=problem.v_head_dim,
        dtype=problem.dtype,
        scale=problem.scale,
        softcap=problem.softcap,
        sink=problem.sink,
        bias=problem.bias_shape,
        mask=problem.mask,
        strategy=decision.strategy,
        kernel=decision.kernel,
        reasons=decision.reasons,
        after=(NodeReport(op, f"torch.ops.neuron_attn.{op}", role="added"),) if taken else (),
    )
