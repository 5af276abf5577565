"""Rounding weights to nearest on a symmetric grid: one scale for each group of a row.

    scale = max |w| / (2^(bits - 1) - 1)        code = round(w / scale)        w' = code * scale

Scales have 16 significant bits, so every code times its scale is exact in float32. Rounding what was rounded therefore
gives the same codes and scales, bit for bit, and zeros stay zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError

_SMALLEST = 1e-30
"""groups with smaller weights alone are zeros: their scales would lose digits"""


class Rounded(NamedTuple):
    """codes int8 [rows, columns]; scales float32 [rows, groups]."""

    codes: Tensor
    scales: Tensor

    def weights(self) -> Tensor:
        """float32 [rows, columns]."""
        (rows, columns), groups = self.codes.shape, self.scales.shape[1]
        return (self.codes.float().view(rows, groups, -1) * self.scales[..., None]).view(rows, columns)


def round_to_nearest(weights: Tensor, bits: int, group: int) -> Rounded:
    """Weights [rows, columns] in 2 to 8 bits, ``group`` columns of a row to a scale (0: the whole row).

    Raises UnweaveError for groups that do not divide the row.
    """
    rows, columns = weights.shape
    check_group(group, columns)
    grouped = weights.float().reshape(rows, -1, group or columns)
    most = 2 ** (bits - 1) - 1
    largest = grouped.abs().amax(-1)
    mantissa, exponent = torch.frexp(largest / most)
    scales = torch.ldexp((mantissa * 2.0**16).round() / 2.0**16, exponent)
    scales = torch.where(largest > _SMALLEST, scales, torch.ones_like(scales))
    codes = (grouped / scales[..., None]).round().clamp(-most, most)
    return Rounded(codes.to(torch.int8).reshape(rows, columns).contiguous(), scales.contiguous())


def check_group(group: int, columns: int, where: str = "") -> None:
    """Raises UnweaveError where groups do not divide rows of so many columns."""
    if group and columns % group:
        remedy = "choose a group size that divides it, or 0: one group a row"
        raise UnweaveError(f"groups of {group} do not divide a row of {columns} weights", where=where, remedy=remedy)


def bits_per_weight(bits: int, group: int, columns: int) -> float:
    """Bits that a weight takes, its share of a scale of 32 bits included."""
    return bits + 32 / (group or columns)


def pack(codes: Tensor) -> Tensor:
    """Codes of 4 bits, int8 [rows, columns] from -7 to 7, two to a byte: uint8 [rows, ceil(columns / 2)]."""
    padded = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).to(torch.int16) + 8
    return (padded[:, ::2] | padded[:, 1::2] << 4).to(torch.uint8)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """What ``pack`` packed, int8 [rows, columns]."""
    pairs = torch.stack([packed & 15, packed >> 4], -1).to(torch.int8) - 8
    return pairs.flatten(1)[:, :columns].contiguous()
