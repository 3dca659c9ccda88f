"""What a dtype does to numbers, against torch; and the bounds of numbers, against random tensors."""

from __future__ import annotations

import math

import pytest
import torch

from neuron_attn_rewrite.values.exact import holds, number_in, product, sums_are_fine


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("value", [0, 1, -1, 127, 128, 200, 255, 256, -129, 40000, -70000])
def test_an_integer_wraps_as_torch_wraps_it(dtype: torch.dtype, value: int) -> None:
    assert number_in(dtype, value) == float(torch.tensor(value, dtype=torch.int64).to(dtype))


def test_a_number_in_a_floating_dtype() -> None:
    assert number_in(torch.float16, -1e9) == -math.inf
    assert number_in(torch.bfloat16, torch.finfo(torch.float32).min) == -math.inf
    assert number_in(torch.float32, torch.finfo(torch.float32).min * 2) == -math.inf
    assert number_in(torch.bfloat16, 257.0) == 256.0
    assert number_in(torch.bool, -math.inf) == 1.0 and number_in(torch.bool, 0.0) == 0.0
    assert math.isnan(number_in(torch.int64, -math.inf))


def test_which_integers_a_dtype_holds() -> None:
    assert holds(torch.int8, -128, 127) and not holds(torch.int8, -129, 0) and not holds(torch.int8, 0, 128)
    assert not holds(torch.uint8, -1, 0) and not holds(torch.bool, 0, 1) and not holds(torch.float32, 0, 1)


def test_factors_are_joined_inside_of_float32_alone() -> None:
    low = torch.finfo(torch.float32).min
    assert product(3.0, -0.5) == -1.5 and product(1.0, low) == low and product(low, -1.0) == -low
    assert product(low, 2.0) is None and product(1e-40, 1e40) is None
    assert product(1.0, math.inf) is None and product(math.nan, 1.0) is None


def test_sums_in_16_bits_round() -> None:
    assert sums_are_fine(torch.float32) and sums_are_fine(torch.float64)
    assert not any(map(sums_are_fine, (torch.float16, torch.bfloat16, torch.int64, torch.bool)))
