"""`nl.NKIObject`: the base of a kernel's own data classes."""

from __future__ import annotations

from typing import Any


def _is_field(value: object) -> bool:
    return not callable(value) and not isinstance(value, property | staticmethod | classmethod)


class NKIObject:
    """Base of a kernel's own data classes. Fields, annotated or not, become keyword arguments, as in NKI."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = dict(vars(cls).get("__annotations__", {}))
        plain = {k: Any for k, v in vars(cls).items() if not k.startswith("__") and k not in own and _is_field(v)}
        cls.__annotations__ = {**own, **plain}

    def __init__(self, **kwargs: Any) -> None:
        fields = {k: v for c in reversed(type(self).__mro__) for k, v in vars(c).get("__annotations__", {}).items()}
        missing = [f for f in fields if f not in kwargs and not hasattr(type(self), f)]
        unknown = [k for k in kwargs if k not in fields and not hasattr(type(self), k)]
        if missing or unknown:
            raise TypeError(f"{type(self).__name__}: fields {missing} are missing, {unknown} are unknown")
        for name in fields:
            if name not in kwargs:
                setattr(self, name, getattr(type(self), name))
        for name, value in kwargs.items():
            setattr(self, name, value)
        post = getattr(self, "__post_init__", None)
        if post is not None:
            post()
