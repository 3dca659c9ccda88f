"""The rewrite as a hook of Inductor, for who compiles with backend="inductor"."""

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

    Behind autograd an attention is the CPU's own flash attention: this is the one hook of Inductor that sees it before.

    Args:
        config: see `RewriteConfig`. What is replaced is not measured: Inductor hands over no values.
    """

    def __init__(self, config: RewriteConfig | None = None) -> None:
        self.config = replace(RewriteConfig.of(config), verify=False)

    def __call__(self, graph: fx.Graph) -> None:
        module = graph.owning_module
        assert isinstance(module, fx.GraphModule) and module.graph is graph
        before = dict(module.named_buffers())
        publish(GraphReport(rewrite_dynamo_graph(module, None, self.config), "inductor"))
        # Inductor may have listed before what the module holds.
        make_in_graph(module, dict(module.named_buffers()).keys() - before)

    def uuid(self) -> str:
        """Changes with the configuration, with torch, and with any line of this package."""
        return pass_id(self.config)


def pass_id(config: RewriteConfig) -> str:
    """What a compile cache must know of a rewrite with this configuration."""
    return hashlib.sha256(f"{sources()}{torch.__version__}{config!r}".encode()).hexdigest()
