"""Rotary frequencies that depend on how long a row is, so that a row never depends on its neighbours.

Two kinds of RoPE in transformers choose their frequencies by the longest row of the batch: ``longrope`` has one set up
to a limit and one beyond it, and ``dynamic`` (NTK) recomputes them for every length beyond it and keeps what it
computed between calls. All other kinds (default, linear, yarn, llama3, proportional) are fixed.

1. ``changing`` finds such modules in a model, and up to which length of a row each keeps its frequencies.
2. ``rows_apart`` gives each row the frequencies that it has alone, afresh at every call. A row's length is its
   largest position plus 1, so padding must repeat a position of its row.
3. ``steady`` says whether rows keep their frequencies while they grow: only then may keys be kept in a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unweave.lm.shortcuts import Replaced


@dataclass(frozen=True, eq=False)
class Changing:
    """A rotary embedding whose frequencies depend on the length of the row."""

    module: Any
    limit: int
    """rows up to this length have the same frequencies"""
    two_sets: bool
    """all rows beyond the limit have the same frequencies, too"""

    def sets(self, lengths: Tensor) -> Tensor:
        """Equal numbers where rows of these lengths have equal frequencies."""
        return (lengths > self.limit).long() if self.two_sets else lengths.clamp(min=self.limit)


def changing(model: nn.Module) -> list[Changing]:
    """The rotary embeddings of a model whose frequencies depend on the length of the row; most models have none."""
    embeddings = []
    for module in model.modules():
        own: Any = getattr(module, "rope_type", None)
        kinds: dict[str | None, str] = own if isinstance(own, dict) else {None: str(own)}
        moving = {layers: kind for layers, kind in kinds.items() if kind == "longrope" or "dynamic" in kind}
        if moving:
            limits = {_limit(module, layers, kind) for layers, kind in moving.items()}
            two_sets = len(limits) == 1 and set(moving.values()) == {"longrope"}
            embeddings.append(Changing(module, min(limits), two_sets))
    return embeddings


def _limit(module: Any, layers: str | None, kind: str) -> int:
    if kind != "longrope":
        return int(module.original_max_seq_len)
    config = module.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rope = rope.get(layers, rope) if layers is not None else rope
    length = rope.get("original_max_position_embeddings")  # version 4 of transformers keeps it in the config alone
    length = length or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    return int(length)


@contextmanager
def rows_apart(rotaries: Sequence[Changing]) -> Iterator[None]:
    """Within, every row has the frequencies that it has alone; afterwards nothing is left of the rows seen."""
    with ExitStack() as stack:
        for rotary in rotaries:
            stack.callback(_reset, rotary.module)
            stack.callback(Replaced(rotary.module, _apart(rotary, rotary.module.forward)).remove)
        yield


def _apart(rotary: Changing, own: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        of_row = rotary.sets(position_ids.amax(-1) + 1)
        tables: list[tuple[Tensor, Tensor, Tensor]] = []
        for frequencies in of_row.unique().tolist():
            rows = (of_row == frequencies).nonzero().squeeze(1)
            _reset(rotary.module)
            tables.append((rows, *own(x, position_ids[rows], *args, **kwargs)))
        back = torch.cat([rows for rows, _, _ in tables]).argsort()
        return torch.cat([cos for _, cos, _ in tables])[back], torch.cat([sin for _, _, sin in tables])[back]

    return forward


def _reset(module: Any) -> None:
    """Resets a rotary embedding to its initial state: what earlier calls left in it would change the next one."""
    kinds = module.rope_type
    for prefix in [f"{layers}_" for layers in kinds] if isinstance(kinds, dict) else [""]:
        original = getattr(module, f"{prefix}original_inv_freq")
        device = getattr(module, f"{prefix}inv_freq").device
        module.register_buffer(f"{prefix}inv_freq", original.to(device, copy=True), persistent=False)
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def steady(rotaries: Sequence[Changing], lengths: Tensor, new: int) -> bool:
    """Whether rows of these lengths keep their frequencies until ``new`` tokens have been added to each."""
    return all(bool((rotary.sets(lengths) == rotary.sets(lengths + new)).all()) for rotary in rotaries)
