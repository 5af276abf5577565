"""The linear maps inside a model's blocks, and the inputs that reach each of them.

A projection is one matrix [out, in]: an ``nn.Linear``, a ``Conv1D`` (stored [in, out]), or one expert's slice of a
parameter that holds all experts of a mixture. Routers, embeddings and the unembedding are none. Fused projections
(q, k and v in one) stay one matrix, since their rows are outputs either way.

Inputs are seen where the matrix is used: a torch function mode compares the weight of every ``linear`` and ``addmm``
with those that are watched. So an expert is seen with the tokens that are routed to it, whatever its module is called.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from unweave.core.errors import UnweaveError

if TYPE_CHECKING:
    from unweave.lm.model import LM

_ROUTERS = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True, eq=False)
class Projection:
    """One matrix of a block."""

    layer: int
    name: str
    """within the block, as ``mlp.down_proj``; the experts of a mixture share one"""
    weight: Tensor
    """[out, in], a view of the model's parameter: what is written into it changes the model"""
    expert: int | None = None

    def __str__(self) -> str:
        return f"{self.layer}.{self.name}" + ("" if self.expert is None else f", expert {self.expert}")


def projections(lm: LM, patterns: Sequence[str] = ("*",)) -> list[Projection]:
    """The projections of all blocks whose ``mlp.down_proj`` or ``3.mlp.down_proj`` fits one of the patterns.

    Raises UnweaveError for a pattern that fits none, and for a model whose blocks hold no linear maps.
    """
    every = [projection for layer in range(lm.n_layers) for projection in _of_block(lm, layer)]
    names = sorted({projection.name for projection in every})
    if not every:
        raise UnweaveError(
            "the blocks of this model have no linear maps that could be compressed",
            where=lm.name,
            remedy="projections must be nn.Linear, Conv1D or experts [expert, out, in] with floating-point weights; "
            "load a quantised model dequantised",
        )
    for pattern in patterns:
        if not any(_fits(projection, pattern) for projection in every):
            raise UnweaveError(f"no projection fits {pattern!r}", where=lm.name, remedy=f"there are {', '.join(names)}")
    return [projection for projection in every if any(_fits(projection, pattern) for pattern in patterns)]


def _fits(projection: Projection, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(n, pattern) for n in (projection.name, f"{projection.layer}.{projection.name}"))


def _of_block(lm: LM, layer: int) -> Iterator[Projection]:
    from transformers.pytorch_utils import Conv1D

    for name, module in lm.layout.blocks[layer].named_modules():
        if name.rpartition(".")[2] in _ROUTERS:
            continue
        if isinstance(module, (nn.Linear, Conv1D)) and module.weight.is_floating_point():
            weight = module.weight.detach()
            yield Projection(layer, name, weight.T if isinstance(module, Conv1D) else weight)
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and name.rpartition(".")[2] == "experts":
                for expert, weight in enumerate(parameter.detach()):
                    yield Projection(layer, f"{name}.{own}", weight, expert)


See = Callable[[Projection, Tensor], None]
"""Gets a projection and its inputs [N, in]; called before it is used."""


@contextmanager
def watch_inputs(lm: LM, watched: Sequence[Projection], see: See) -> Iterator[None]:
    """Calls ``see`` whenever one of the projections is used in the ``with`` block. What it raises ends the pass."""
    experts = getattr(lm.model, "set_experts_implementation", None)
    usual = getattr(lm.model.config, "_experts_implementation", None)
    fused = experts is not None and usual is not None and any(p.expert is not None for p in watched)
    if experts is not None and fused:
        experts("eager")  # a grouped product uses all experts' weights at once
    try:
        with _Watch({projection.weight.data_ptr(): projection for projection in watched}, see):
            yield
    finally:
        if experts is not None and fused:
            experts(usual)


class _Watch(TorchFunctionMode):
    def __init__(self, by_address: dict[int, Projection], see: See) -> None:
        super().__init__()
        self._by_address, self._see = by_address, see

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        del types
        first = {F.linear: 0, torch.addmm: 1}.get(func)
        if first is not None and len(args) > first + 1:
            projection = self._by_address.get(args[first + 1].data_ptr())
            if projection is not None:
                self._see(projection, args[first].reshape(-1, args[first].shape[-1]))
        return func(*args, **(kwargs or {}))
