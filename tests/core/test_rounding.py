"""Rounding to nearest: the grid, the exact round trip, and codes of four bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave.core.errors import UnweaveError
from unweave.core.rounding import bits_per_weight, pack, round_to_nearest, unpack


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
@pytest.mark.parametrize("group", [0, 8])
def test_every_weight_goes_to_the_nearest_point_of_its_groups_grid(
    bits: int, group: int, generator: torch.Generator
) -> None:
    weights = torch.randn(6, 24, generator=generator)
    rounded = round_to_nearest(weights, bits, group)
    most, new = 2 ** (bits - 1) - 1, rounded.weights()
    width = group or 24
    for row in range(6):
        for place in range(24):
            part = weights[row, place // width * width :][:width]
            scale = float(rounded.scales[row, place // width])
            assert abs(scale - float(part.abs().max()) / most) < 1e-4 * scale
            grid = torch.arange(-most, most + 1) * scale
            assert torch.isclose(new[row, place], grid[(grid - weights[row, place]).abs().argmin()], rtol=1e-5)
    assert int(rounded.codes.abs().max()) == most


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([3, 4, 8]), st.floats(-25, 25), st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_rounding_what_was_rounded_changes_no_bit(bits: int, size: float, seed: int, dtype: torch.dtype) -> None:
    weights = torch.randn(7, 32, generator=torch.Generator().manual_seed(seed)) * 10.0**size
    weights[2] = 0.0
    first = round_to_nearest(weights.to(dtype), bits, 16)
    again = round_to_nearest(first.weights(), bits, 16)
    assert torch.equal(first.codes, again.codes) and torch.equal(first.scales, again.scales)
    assert (first.weights()[2] == 0).all()


def test_zeros_stay_zeros_and_bits_count_the_scales(generator: torch.Generator) -> None:
    weights = torch.randn(4, 16, generator=generator)
    weights[:, ::2] = 0.0
    assert (round_to_nearest(weights, 3, 8).weights()[:, ::2] == 0).all()
    assert bits_per_weight(4, 64, 576) == 4.5 and bits_per_weight(8, 0, 32) == 9


def test_groups_that_do_not_divide_the_row_are_refused() -> None:
    with pytest.raises(UnweaveError, match="groups of 7 do not divide a row of 16"):
        round_to_nearest(torch.ones(2, 16), 4, 7)


@pytest.mark.parametrize("columns", [1, 7, 16])
def test_codes_of_four_bits_are_packed_two_to_a_byte(columns: int, generator: torch.Generator) -> None:
    codes = torch.randint(-7, 8, (5, columns), generator=generator).to(torch.int8)
    packed = pack(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (5, (columns + 1) // 2)
    assert torch.equal(unpack(packed, columns), codes)
