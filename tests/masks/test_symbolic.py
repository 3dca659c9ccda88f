"""Which tensors the evaluator follows, and which become variables or stay unknown."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from neuron_attn_rewrite.masks.affine import Affine, Element, Truth, variable
from neuron_attn_rewrite.masks.cases import Case, Cases, Unknown, truth
from neuron_attn_rewrite.masks.symbolic import SymbolicEvaluator
from tests.masks.test_soundness import graph_of

FIRST = (Affine(),)


def evaluated(
    program: Callable[[Tensor], Tensor], given: Tensor, changed: str = "", **options: bool
) -> tuple[fx.Node, Cases | str]:
    """The last node of a program, and its first element, or why it is unknown."""
    module = graph_of(lambda mask: program(mask), (given,))
    (node,) = module.graph.output_node().all_input_nodes
    written = frozenset(n for n in module.graph.nodes if n.name == changed)
    evaluator = SymbolicEvaluator(module, changed=written, **options)
    try:
        return node, evaluator.cases(node, FIRST)
    except Unknown as unknown:
        with pytest.raises(Unknown, match=str(unknown)):
            evaluator.cases(node, FIRST)
        return node, str(unknown)


FLOATS, BITS = torch.rand(3), torch.ones(3, dtype=torch.bool)
UNKNOWN: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, str]] = {
    "an input of floats": (lambda x: x + 0, FLOATS, "is an input"),
    "random numbers": (lambda x: torch.rand_like(x), FLOATS, "is random"),
    "random integers in 16 bits": (lambda x: torch.randint_like(x, 9), FLOATS.to(torch.int16), "is random"),
    "no rule": (lambda x: torch.arange(3.0).sin(), FLOATS, "does not hold integers|no rule for sin"),
    "a sum in 16 bits": (lambda x: x.cumsum(0, dtype=torch.int16), FLOATS.to(torch.int16), "vary"),
}


@pytest.mark.parametrize("names_numbers", [False, True])
@pytest.mark.parametrize("name", UNKNOWN)
def test_what_stays_unknown(name: str, names_numbers: bool) -> None:
    program, given, words = UNKNOWN[name]
    _, found = evaluated(program, given, names_numbers=names_numbers)
    assert isinstance(found, str) and any(word in found for word in words.split("|"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_an_input_of_integers_is_a_variable(dtype: torch.dtype) -> None:
    node, found = evaluated(lambda x: x.clone(), torch.ones(3).to(dtype))
    assert found == (Case(frozenset(), variable(Element(node.all_input_nodes[0], FIRST))),)


def test_a_bool_without_a_rule_is_a_variable() -> None:
    for program, given in ((lambda x: x.isnan(), FLOATS), (lambda x: x < 0.5, FLOATS), (lambda x: x.clone(), BITS)):
        node, found = evaluated(program, given)
        source = node if given is FLOATS else node.all_input_nodes[0]
        assert found == truth(source, FIRST)
        assert isinstance(next(iter(found[0].guard)).terms, frozenset)
        assert any(isinstance(v, Truth) for case in found for g in case.guard for v in g.variables())


def test_a_number_without_a_rule_is_a_variable_if_asked() -> None:
    def program(x: Tensor) -> Tensor:
        return x.cumsum(0)

    node, found = evaluated(program, torch.ones(3).long(), names_numbers=True)
    assert found == (Case(frozenset(), variable(Element(node, FIRST))),)
    _, found = evaluated(program, torch.ones(3).long())
    assert isinstance(found, str) and "vary" in found


def test_a_tensor_that_is_written_is_unknown() -> None:
    for dtype in (torch.bool, torch.int64):
        for names_numbers in (False, True):
            _, found = evaluated(lambda x: x.clone(), torch.ones(3).to(dtype), "clone", names_numbers=names_numbers)
            assert found == "the model writes into clone"


def test_what_is_assumed_of_a_mask_is_kept_with_its_elements() -> None:
    module = graph_of(lambda mask: (mask * 2, mask.float().sin() > 0, mask == 0), (torch.ones(3).long(),))
    twice, guess, is_zero = module.graph.output_node().all_input_nodes
    evaluator = SymbolicEvaluator(module, changed=frozenset())
    (mask,) = twice.all_input_nodes
    for _ in range(2):
        for node, assumed in ((guess, set()), (is_zero, set()), (twice, {mask}), (guess, {mask})):
            evaluator.cases(node, FIRST)
            assert evaluator.assumed == assumed, node
        evaluator.assumed.clear()


def test_what_is_no_tensor_is_unknown() -> None:
    module = graph_of(lambda x: x.max(0)[0], (FLOATS,))
    (node,) = module.graph.output_node().all_input_nodes
    evaluator = SymbolicEvaluator(module, changed=frozenset(), names_numbers=True)
    with pytest.raises(Unknown, match=r"is not a tensor|no rule"):
        evaluator.cases(node, FIRST)
