"""The rewrite as a graph pass of Inductor, for users of backend="inductor"."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from neuron_attn_rewrite.backends.compile import GraphReport, publish, rewrite_dynamo_graph
from neuron_attn_rewrite.backends.dynamo import make_in_graph, sources
from neuron_attn_rewrite.config.options import RewriteConfig


class InductorPass(CustomGraphPass):
    """`torch._inductor.config.pre_grad_custom_pass = InductorPass(config)`.

    After autograd, an attention is already the CPU's own flash attention. This is the only hook of Inductor that runs
    before it.

    Args:
        config: see `RewriteConfig`. The replaced attentions are not verified, because Inductor gives a pass no inputs.
    """

    def __init__(self, config: RewriteConfig | None = None) -> None:
        self.config = replace(RewriteConfig.of(config), verify=False)

    def __call__(self, graph: fx.Graph) -> None:
        module = graph.owning_module
        assert isinstance(module, fx.GraphModule) and module.graph is graph
        before = dict(module.named_buffers())
        publish(GraphReport(rewrite_dynamo_graph(module, None, self.config), "inductor"))
        # Inductor may have listed the buffers of the module already.
        make_in_graph(module, dict(module.named_buffers()).keys() - before)

    def uuid(self) -> str:
        """The key for compile caches. It changes with the configuration, torch, and the source of this package."""
        return pass_id(self.config)


def pass_id(config: RewriteConfig) -> str:
    """The key of a rewrite with this configuration for compile caches."""
    return hashlib.sha256(f"{sources()}{torch.__version__}{config!r}".encode()).hexdigest()
