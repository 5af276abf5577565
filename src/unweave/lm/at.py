"""What an edit knows of where it is: the tokens of the forward pass, and what came before them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unweave.core.site import Site
from unweave.lm.chat import Role


@dataclass(frozen=True)
class At:
    """What an edit knows of where it is."""

    site: Site
    ids: Tensor
    """token ids of this forward pass, int64 [B, P]"""
    mask: Tensor
    """True at tokens, False at padding, bool [B, P]"""
    roles: Tensor
    """one Role per token, uint8 [B, P]"""
    step: int
    """0 for the prompt; n for the n-th generated token's pass: that token, or the whole row where no keys are kept"""
    read: Mapping[Site, Tensor]
    """values read earlier in this forward pass, [B, P, D]"""
    row: Tensor
    """one Role per token of the row so far, uint8 [B, N]: this pass holds the last P of them"""

    @property
    def answer(self) -> Tensor:
        """n at the n-th token of the answer, 0 elsewhere, int64 [B, P]. The answer is what the assistant says behind
        everybody else's last word: what is generated, and a beginning of it that was given."""
        others = torch.tensor([Role.SYSTEM, Role.USER, Role.TEXT], dtype=self.row.dtype, device=self.row.device)
        before = torch.isin(self.row, others).flip(1).cumsum(1).flip(1) > 0
        own = (self.row == Role.ASSISTANT) & ~before
        return (own.cumsum(1) * own)[:, -self.ids.shape[1] :]


def roles_so_far(prompt: Tensor, n_positions: int, seen: int | None) -> Tensor:
    """The roles of all ``seen`` tokens at a later pass of a generation: the prompt's [B, N], and ASSISTANT behind it.

    The pass holds the last ``n_positions`` of them: the newest alone, or without a cache all.
    """
    before = prompt.shape[1]
    if seen is None:  # then a pass longer than the prompt holds everything, and a shorter one what is new
        seen = n_positions if n_positions > before else before + n_positions
    new = prompt.new_full((len(prompt), max(0, seen - before)), Role.ASSISTANT)
    return torch.cat([prompt, new], dim=1)[:, :seen]
