"""The math operators of the engines: ALU operators and activation functions (source: `nki.api.shared.rst`).

Arithmetic takes float32 and gives float32. Operators on bits take integers of one dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from neuron_attn_rewrite.simulator.machine.dtypes import Array


@dataclass(frozen=True, eq=False)
class Operator:
    """One operator. A use that the hardware does not have is None.

    binary, unary: of the ALU of the vector and GpSimd engines. bits: on integers. reduce: along the last axis, which
    stays with size 1; `identity` is the value it starts from. activation: the function of the scalar engine. It is
    valid for x in [low, high], or for |x| in [low, high] if `signed`.
    """

    name: str
    binary: Callable[[Any, Any], Any] | None = None
    unary: Callable[[Any], Any] | None = None
    bits: Callable[..., Any] | None = None
    reduce: Callable[[Array], Array] | None = None
    activation: Callable[[Array], Array] | None = None
    compares: bool = False
    identity: float | None = None
    low: float = -math.inf
    high: float = math.inf
    signed: bool = False

    def __repr__(self) -> str:
        return f"nl.{self.name}"


def _float(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *x: np.asarray(f(*x)).astype(np.float32)


def _reducer(ufunc: np.ufunc) -> Callable[[Array], Array]:
    return lambda x: ufunc.reduce(x, axis=-1, keepdims=True)


def _erf(x: Array) -> Array:
    import torch

    result: Array = torch.erf(torch.from_numpy(np.ascontiguousarray(x))).numpy()
    return result


def _sigmoid(x: Array) -> Array:
    result: Array = 1 / (1 + np.exp(-x))
    return result


def _gelu_tanh(x: Array) -> Array:
    result: Array = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return result


def _softplus(x: Array) -> Array:
    result: Array = np.logaddexp(np.float32(0), x)
    return result


_ALL = (
    Operator("add", np.add, reduce=_reducer(np.add), identity=0.0),
    Operator("subtract", np.subtract, reduce=lambda x: x[..., :1] - np.add.reduce(x[..., 1:], axis=-1, keepdims=True)),
    Operator("multiply", np.multiply, reduce=_reducer(np.multiply), identity=1.0),
    Operator("maximum", np.maximum, reduce=_reducer(np.maximum), identity=-math.inf),
    Operator("minimum", np.minimum, reduce=_reducer(np.minimum), identity=math.inf),
    Operator("equal", _float(np.equal), compares=True),
    Operator("not_equal", _float(np.not_equal), compares=True),
    Operator("greater_equal", _float(np.greater_equal), compares=True),
    Operator("greater", _float(np.greater), compares=True),
    Operator("less_equal", _float(np.less_equal), compares=True),
    Operator("less", _float(np.less), compares=True),
    Operator("logical_and", _float(np.logical_and), reduce=_float(_reducer(np.logical_and))),
    Operator("logical_or", _float(np.logical_or), reduce=_float(_reducer(np.logical_or))),
    Operator("logical_xor", _float(np.logical_xor), reduce=_float(_reducer(np.logical_xor))),
    Operator("power", _float(np.power)),
    Operator("abs_max", lambda a, b: np.maximum(np.abs(a), np.abs(b))),
    Operator("abs_min", lambda a, b: np.minimum(np.abs(a), np.abs(b))),
    Operator("bypass", lambda a, b: a),
    Operator("abs", unary=np.abs, activation=np.abs),
    Operator("square", unary=np.square, activation=np.square),
    Operator("relu", unary=lambda x: np.maximum(x, 0), activation=lambda x: np.maximum(x, 0)),
    Operator("rsqrt", unary=lambda x: 1 / np.sqrt(x), activation=lambda x: 1 / np.sqrt(x), low=2.0**-87, high=2.0**97),
    Operator("reciprocal", unary=lambda x: 1 / x, activation=lambda x: 1 / x, low=2.0**-42, high=2.0**42, signed=True),
    Operator("copy", activation=lambda x: x),
    Operator("exp", activation=np.exp),
    Operator("log", activation=np.log, low=2.0**-64, high=2.0**64),
    Operator("sqrt", activation=np.sqrt, low=2.0**-116, high=2.0**118),
    Operator("sin", activation=np.sin, low=-math.pi, high=math.pi),
    Operator("arctan", activation=np.arctan, low=-math.pi / 2, high=math.pi / 2),
    Operator("tanh", activation=np.tanh),
    Operator("sigmoid", activation=_sigmoid),
    Operator("erf", activation=_erf),
    Operator("gelu", activation=lambda x: 0.5 * x * (1 + _erf(x * np.float32(math.sqrt(0.5))))),
    Operator("gelu_apprx_tanh", activation=_gelu_tanh),
    Operator("gelu_apprx_sigmoid", activation=lambda x: x * _sigmoid(1.702 * x)),
    Operator("silu", activation=lambda x: x * _sigmoid(x)),
    Operator("softplus", activation=_softplus),
    Operator("mish", activation=lambda x: x * np.tanh(_softplus(x))),
    Operator("sign", activation=np.sign),
    Operator("invert", bits=np.invert),
    Operator("bitwise_and", bits=np.bitwise_and, reduce=_reducer(np.bitwise_and)),
    Operator("bitwise_or", bits=np.bitwise_or, reduce=_reducer(np.bitwise_or)),
    Operator("bitwise_xor", bits=np.bitwise_xor, reduce=_reducer(np.bitwise_xor)),
    Operator("left_shift", bits=np.left_shift),
    Operator("right_shift", bits=np.right_shift),
)

OPERATORS: dict[str, Operator] = {o.name: o for o in _ALL}
"""By the name that `nl` has for them."""
