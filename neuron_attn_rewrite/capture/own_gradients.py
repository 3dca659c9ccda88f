"""Notes where a model defines gradients itself. A graph holds operators, and a result has the gradients of these."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.fx.experimental.proxy_tensor import get_proxy_mode

WITHOUT_EFFECT = frozenset({"_NoopSaveInputs", "ModIndex"})
"""Functions of torch with the gradients of their operators: of torch.utils.checkpoint, and of indexing in a vmap."""
IN_DYNAMO = frozenset({"ApplyTemplate"})
"""The function that stands for the model's own in a graph of Dynamo."""
REMEDY = (
    "Write it as operators, as a torch.library.custom_op with register_autograd, or train with torch.compile's "
    "backend, which leaves such a graph as it is."
)


def _without_vmap(name: str) -> str:
    """The name of a function before torch.vmap has made another class of it."""
    while name.startswith("Vmapped"):
        name = name.removeprefix("Vmapped")
    return name


@contextlib.contextmanager
def own_gradients() -> Iterator[list[str]]:
    """Note each `torch.autograd.Function` and each hook of a tensor that a tracer passes, in words, in the list given.

    A function inside an operator, such as a custom operator's own, is not noted: the operator stays in the graph, and
    keeps its gradients. The tracer does not trace then.
    """
    noted: list[str] = []
    ambient = torch.is_grad_enabled()
    plain: Any = vars(Function)["apply"]
    plain_hook: Any = Tensor.register_hook

    def note(words: str) -> None:
        is_off = ambient and not torch.is_grad_enabled()
        if get_proxy_mode() is not None and not is_off and words not in noted:
            noted.append(words)

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        if _without_vmap(cls.__name__) not in WITHOUT_EFFECT:
            name = "" if cls.__name__ in IN_DYNAMO else f" {cls.__qualname__}"
            note(f"torch.autograd.Function{name}")
        return plain.__get__(None, cls)(*args, **kwargs)

    def register_hook(self: Tensor, hook: Callable[..., Any]) -> Any:
        note("Tensor.register_hook")
        return plain_hook(self, hook)

    Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    Tensor.register_hook = register_hook  # type: ignore[method-assign]
    try:
        yield noted
    finally:
        Function.apply = plain  # type: ignore[method-assign]
        Tensor.register_hook = plain_hook  # type: ignore[method-assign]
