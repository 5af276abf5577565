"""Modules that do less than they could, because nobody looks at the rest: blocks left out, tokens left out. And blocks
that keep less than they could, because they can compute it again.

A module's ``forward`` is replaced on the instance and put back, so hooks on it stay where they are. ``taps`` uses this
to begin a pass in the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from unweave.lm.model import LM


class Replaced:
    """A module with another ``forward``, until ``remove``."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module, self.own = module, module.__dict__.get("forward")
        module.__dict__["forward"] = forward

    def remove(self) -> None:
        del self.module.__dict__["forward"]
        if self.own is not None:
            self.module.__dict__["forward"] = self.own


def skipped(block: nn.Module, wrapped: bool) -> Replaced:
    """A block that returns its input, in a tuple where its family's blocks return one."""

    def forward(hidden_states: Tensor, *_args: object, **_kwargs: object) -> Any:
        return (hidden_states,) if wrapped else hidden_states

    return Replaced(block, forward)


@contextmanager
def recomputed(lm: LM) -> Iterator[None]:
    """Backward passes compute what is inside each block again, so that passes keep only the blocks' inputs (gradient
    checkpointing). Hooks inside blocks run again with it: taps must stay open until the backward pass is over."""
    replaced = [Replaced(block, _again(block.forward)) for block in lm.layout.blocks]
    try:
        yield
    finally:
        for replacement in replaced:
            replacement.remove()


def _again(own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return own(*args, **kwargs)
        return checkpoint(own, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return forward


@contextmanager
def last_tokens_only(lm: LM, last: Tensor) -> Iterator[None]:
    """Passes whose logits are wanted at token ``last`` (int64 [R]) of each row: what nothing else needs is left out.

    In the last block no later token's attention sees what attention and MLP add, so output projection and MLP run on
    one token a row; at the others they give 0. Keys and values are whole. Values inside the last block and after it are
    then right at these tokens alone; gradients of the logits are right everywhere.
    """
    family, block = lm.layout.family, lm.layout.blocks[-1]
    replaced: list[Replaced] = []
    try:
        for path in (family.heads, family.mlp):
            module = block.get_submodule(path)
            replaced.append(Replaced(module, _at(module.forward, last)))
        yield
    finally:
        for replacement in reversed(replaced):
            replacement.remove()


def _at(own: Callable[..., Tensor], last: Tensor) -> Callable[..., Tensor]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = torch.arange(len(x), device=x.device)
        out = own(x[rows, last].unsqueeze(1), *args, **kwargs)
        return out.new_zeros(*x.shape[:2], out.shape[-1]).index_put((rows, last), out.squeeze(1))

    return forward
