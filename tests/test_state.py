"""State that changes after a rewrite: what is shared, what is checked, and what is refused."""

from __future__ import annotations

import copy
import timeit
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuron_attn_rewrite import InputError, RewriteError, rewrite
from tests.helpers import ALWAYS, relative_error


class Masked(nn.Module):
    """Its mask and scale are buffers. The sum of the mask is part of the output, so the graph still reads the mask."""

    def __init__(self, reads_mask: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reads_mask = reads_mask
        self.qkv = nn.Linear(16, 48)
        self.register_buffer("mask", torch.ones(8, 8, dtype=torch.bool).tril())
        self.register_buffer("scale", torch.tensor(0.25))
        self.register_buffer("offset", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.qkv(x) + self.offset.repeat(3)).view(1, 8, 3, 2, 8).permute(2, 0, 3, 1, 4)
        out = (q @ k.mT * self.scale).masked_fill(~self.mask, float("-inf")).softmax(-1) @ v
        return out + self.mask.sum() if self.reads_mask else out


def rewritten_pair(**options: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    model, x = Masked(**options).eval(), torch.randn(1, 8, 16)
    rewritten = rewrite(model, (x,), config=ALWAYS)
    assert len(rewritten.report.replaced) == 1
    return model, rewritten, x


def load_into_parent(model: nn.Module, rewritten: nn.Module) -> None:
    state = copy.deepcopy(nn.Sequential(rewritten).state_dict())
    state["0.mask"].fill_(True)
    nn.Sequential(rewritten).load_state_dict(state)


def load_into_original(model: nn.Module, rewritten: nn.Module) -> None:
    model.load_state_dict({**model.state_dict(), "mask": torch.ones(8, 8, dtype=torch.bool)})


def assign_in_result(model: nn.Module, rewritten: nn.Module) -> None:
    rewritten.mask = torch.ones(8, 8, dtype=torch.bool)


def other_memory(model: nn.Module, rewritten: nn.Module) -> None:
    model.scale.data = torch.tensor(2.0)


CHANGES = [
    other_memory,
    load_into_parent,
    load_into_original,
    assign_in_result,
    lambda model, rewritten: model.scale.fill_(2.0),
    lambda model, rewritten: rewritten.scale.mul_(2.0),
    lambda model, rewritten: model.mask[0].fill_(True),
]


@pytest.mark.parametrize("reads_mask", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_proven_value_that_changes_is_an_error(change: Any, reads_mask: bool) -> None:
    model, rewritten, x = rewritten_pair(reads_mask=reads_mask)
    rewritten(x)
    with pytest.raises(RewriteError, match="proof depends on"):
        change(model, rewritten)
        rewritten(x)


def test_what_no_proof_reads_may_change() -> None:
    model, rewritten, x = rewritten_pair()
    model.offset.add_(1.0)
    with torch.no_grad():
        model.qkv.weight.mul_(2)
    assert relative_error(rewritten(x), model(x)) < 1e-5
    nn.Sequential(rewritten).load_state_dict({f"0.{k}": v for k, v in Masked().state_dict().items()})
    assert relative_error(rewritten(x), model(x)) < 1e-5 and not model.offset.any()


def test_a_proven_value_may_be_written_if_it_stays_the_same() -> None:
    model, rewritten, x = rewritten_pair()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    rewritten(x)
    model.scale.fill_(2.0)
    with pytest.raises(RewriteError, match="'scale' has changed"):
        rewritten(x)
    model.scale.fill_(0.25)
    assert relative_error(rewritten(x), model(x)) < 1e-5


def test_a_copy_has_values_of_its_own() -> None:
    model, rewritten, x = rewritten_pair()
    twin = copy.deepcopy(rewritten)
    model.scale.fill_(2.0)
    twin(x)
    twin.get_buffer("scale").fill_(2.0)
    with pytest.raises(RewriteError, match="'scale' has changed"):
        twin(x)


def test_buffers_of_inference_mode_are_compared() -> None:
    with torch.inference_mode():
        model, x = Masked().eval(), torch.randn(1, 8, 16)
        rewritten = rewrite(model, (x,), config=ALWAYS)
        rewritten(x)
        model.scale.fill_(2.0)
        with pytest.raises(RewriteError, match="'scale' has changed"):
            rewritten(x)


def test_values_without_a_replaced_attention_are_free() -> None:
    model, x = Masked().eval(), torch.randn(1, 8, 16)
    rewritten = rewrite(model, (x,))
    assert not rewritten.report.replaced
    model.mask.fill_(True)
    assert relative_error(rewritten(x), model(x)) < 1e-5


def test_the_check_is_cheap() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Masked() for _ in range(24))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x).transpose(1, 2).reshape(1, 8, 16)
            return x

    x = torch.randn(1, 8, 16)
    rewritten = rewrite(Layers().eval(), (x,), config=ALWAYS)
    rewritten(x)
    assert len(rewritten._seen) == 48
    assert min(timeit.repeat(rewritten._check_proven_values, number=100, repeat=5)) / 100 < 50e-6


class Defaults(nn.Module):
    """Its arguments have defaults that change the result."""

    def forward(
        self, x: Tensor, gain: float = 1.0, mask: Tensor | None = None, causal: bool = True, **more: Any
    ) -> Tensor:
        x = x * gain if mask is None else x * gain + mask
        x = x + 1 if more.get("shifted") else x
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=causal)


def test_an_argument_that_is_left_out_has_its_default() -> None:
    model, x = Defaults(), torch.randn(1, 2, 8, 4)
    rewritten = rewrite(model, (x,), {"causal": True}, config=ALWAYS)
    assert relative_error(rewritten(x), model(x)) < 1e-5
    assert relative_error(rewritten(x, 1.0, None, True), model(x)) < 1e-5
    rewritten = rewrite(model, (x,), {"causal": False, "gain": 2.0}, config=ALWAYS)
    assert relative_error(rewritten(x, 2.0, causal=False), model(x, 2.0, causal=False)) < 1e-5
    for args, options in (((x,), {"gain": 2.0}), ((x, 2.0), {}), ((x,), {"causal": False})):
        with pytest.raises(InputError, match="is missing: its default is"):
            rewritten(*args, **options)


def test_a_position_means_what_it_means_to_the_model() -> None:
    model, x, mask = Defaults(), torch.randn(1, 2, 8, 4), torch.randn(1, 2, 8, 4)
    rewritten = rewrite(model, (x,), {"mask": mask}, config=ALWAYS)
    assert relative_error(rewritten(x, 1.0, mask), model(x, 1.0, mask)) < 1e-5
    for args, message in (((x, mask), "'gain' was not captured"), ((x,), "'mask' is missing")):
        with pytest.raises(InputError, match=message):
            rewritten(*args)
    with pytest.raises(InputError, match="'gain' was not captured"):
        rewritten(x, None, mask)


def test_an_argument_without_a_default_must_be_given() -> None:
    model, x = Defaults(), torch.randn(1, 2, 8, 4)
    rewritten = rewrite(model, (x,), {"shifted": True}, config=ALWAYS)
    assert relative_error(rewritten(x, shifted=True), model(x, shifted=True)) < 1e-5
    with pytest.raises(InputError, match="'shifted' is missing: it was captured as True"):
        rewritten(x)
