"""Gradients of the loss by a model's parameters, one per example, in a few thousand random dimensions.

Marks et al. 2024, app. G.3, after Michaud et al. 2023: contexts whose gradients point the same way are predicted by the
same mechanism. The projection is a random matrix R with entries -1, 0 and 1.

1. A linear layer's gradient for an example is a sum over positions of outer products: what went in, times the loss's
   gradient by what came out. Both are kept for a batch; the gradient itself is only made for a block of parameters.
2. R is made for that block, from a seed of its own, used, and forgotten. It is never whole in memory.

Parameters are those of all linear layers, weights and biases. Embeddings, the unembedding and norms are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.lm.taps import At

DIMENSIONS = 30_000
DENSITY = 32 / 30_000
_BLOCK_ENTRIES = 1 << 22
"""non-zero entries of R in a block, about: 50 MB. Part of R's definition, since every block has a seed of its own."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a linear layer: ``value`` holds [rows, columns] for a weight, [1, columns] for a bias."""

    name: str
    module: str
    rows: int
    columns: int
    kind: str
    """weight (rows are outputs), transposed (rows are inputs, as GPT-2's layers store them), or bias"""


def parameters(lm: LM) -> list[Parameter]:
    """The parameters whose gradients count, in the model's order. UnweaveError for layers of an unknown kind."""
    from transformers.pytorch_utils import Conv1D

    head = lm.model.get_output_embeddings()
    chosen = []
    for path, module in lm.model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own or module is head or isinstance(module, nn.Embedding):
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            kind = "weight" if isinstance(module, nn.Linear) else "transposed"
            chosen.append(Parameter(f"{path}.weight", path, module.weight.shape[0], module.weight.shape[1], kind))
            if module.bias is not None:
                chosen.append(Parameter(f"{path}.bias", path, 1, len(module.bias), "bias"))
        elif any(parameter.ndim > 1 for parameter in own.values()):
            remedy = "use other vectors: activations, latents or effects"
            raise UnweaveError(f"gradients of {type(module).__name__} are not known", where=path, remedy=remedy)
    return chosen


def projection_block(
    seed: int, parameter: int, block: int, n: int, dimensions: int = DIMENSIONS, density: float = DENSITY
) -> sp.csr_array:
    """Rows of R for ``n`` numbers of a parameter: float32 [n, dimensions], entries -1, 0 and 1.

    Each entry is non-zero with probability ``density``, and then -1 or 1 with equal chances. The same arguments give
    the same block. E[(a R) . (b R)] = dimensions x density x (a . b).
    """
    _require(dimensions, density)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, parameter, block])))
    total = n * dimensions
    at = _places(rng, total, density)
    signs = (2 * rng.integers(0, 2, len(at), dtype=np.int8) - 1).astype(np.float32)
    rows, columns = np.divmod(at, dimensions)
    starts = np.searchsorted(rows, np.arange(n + 1))
    return sp.csr_array((signs, columns.astype(np.int32), starts.astype(np.int32)), shape=(n, dimensions))


def _places(rng: np.random.Generator, total: int, density: float) -> np.ndarray:
    """Which of ``total`` entries are non-zero, each by itself with probability ``density``: the gaps between them are
    geometric, and those are what is drawn."""
    if density >= 1:
        return np.arange(total)
    rate = -np.log1p(-density)
    parts, last = [np.zeros(0, np.int64)], -1
    while last < total:
        wanted = int(density * (total - last - 1)) + 64
        gaps = np.ceil(rng.standard_exponential(wanted) / rate).astype(np.int64)
        parts.append(last + np.cumsum(np.maximum(gaps, 1)))
        last = int(parts[-1][-1])
    at = np.concatenate(parts)
    return at[at < total]


def blocks(parameter: Parameter, dimensions: int, density: float) -> Iterator[slice]:
    """The rows of a parameter that share a block of R."""
    step = max(1, int(_BLOCK_ENTRIES / (density * dimensions)) // parameter.columns)
    for start in range(0, parameter.rows, step):
        yield slice(start, min(start + step, parameter.rows))


def projected_gradients(
    lm: LM,
    tokens: Tokens,
    metric: Callable[[Tensor, Tensor], Tensor],
    *,
    dimensions: int = DIMENSIONS,
    density: float = DENSITY,
    seed: int = 0,
) -> np.ndarray:
    """Each example's gradient by all ``parameters``, times R: float32 [B, dimensions]. Padding must be on the right.

    ``metric(logits [B, V] at each row's last token, rows [B]) -> [B]``. R costs about as much to make as to apply to
    ten examples, so batches should not be small. A batch keeps every linear layer's inputs and the gradients by its
    outputs: in SmolLM2-135M about 1.2 MB for each of its tokens.
    """
    _require(dimensions, density)
    chosen = parameters(lm)
    inputs, outputs = _outer_factors(lm, sorted({p.module for p in chosen}), tokens, metric)
    projected = np.zeros((len(tokens), dimensions), dtype=np.float32)
    for number, parameter in enumerate(chosen):
        x, delta = inputs[parameter.module], outputs[parameter.module]
        for block, rows in enumerate(blocks(parameter, dimensions, density)):
            gradient = _block(parameter, rows, x, delta).flatten(1).float().cpu().numpy()
            projection = projection_block(seed, number, block, gradient.shape[1], dimensions, density)
            projected += (projection.T @ np.ascontiguousarray(gradient.T)).T
    return projected


def _block(parameter: Parameter, rows: slice, x: Tensor, delta: Tensor) -> Tensor:
    """Some rows of each example's gradient, [B, rows, columns], from inputs x and output gradients delta [B, P, D]."""
    if parameter.kind == "bias":
        return delta.sum(1, keepdim=True)
    if parameter.kind == "transposed":
        return x[..., rows].mT @ delta
    return delta[..., rows].mT @ x


def _outer_factors(
    lm: LM, modules: list[str], tokens: Tokens, metric: Callable[[Tensor, Tensor], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What goes into each linear layer, and the metric's gradient by what comes out, both [B, P, D]."""
    ins = {name: Site("path", path=f"{name}@in") for name in modules}
    outs = {name: Site("path", path=name) for name in modules}
    last = tokens.mask.sum(1) - 1
    rows = torch.arange(len(tokens), device=tokens.ids.device)
    width = tokens.ids.shape[1]
    keep = width - int(last.min())
    values: dict[Site, Tensor] = {}

    def leaf(x: Tensor, _at: At) -> Tensor:
        return x.detach().requires_grad_()

    def probe(x: Tensor, at: At) -> Tensor:
        values[at.site] = x.view_as(x)  # a node of its own, whatever the model does with its output
        return values[at.site]

    edits: dict[Site, Any] = {Site("embed"): leaf} | dict.fromkeys(outs.values(), probe)
    with torch.enable_grad():
        with lm.taps(read=ins.values(), edit=edits, grad=True) as seen:
            logits = lm(tokens, keep_logits=keep)
        assert logits is not None
        value = metric(logits[rows, last - (width - keep)].float(), rows).sum()
    gradients = torch.autograd.grad(value, [values[outs[name]] for name in modules])
    inputs = {name: seen[ins[name]].detach() for name in modules}
    return inputs, dict(zip(modules, gradients, strict=True))


def _require(dimensions: int, density: float) -> None:
    if dimensions < 1 or not 0 < density <= 1:
        what = f"no projection has {dimensions} dimensions and a density of {density}"
        raise UnweaveError(what, where="dimensions", remedy=f"the paper has {DIMENSIONS:,} and {DENSITY:.4g}")
