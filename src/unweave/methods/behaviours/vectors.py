"""What a model does with a context, as one vector, so that contexts can be compared (Marks et al. 2024, app. G.2).

    activations      the sites' own values, side by side
    latents          the SAEs' latents there; sparse
    effects-dense    gradient x (0 - activation): the linear estimate of ablating each coordinate
    effects-latents  the same of each latent; sparse
    gradients        the gradient of the loss by the model's parameters, projected

The metric of effects and gradients is m = -log p(answer). All but gradients are taken at the last position, at the last
five, or summed over all but the first ones.

Contexts whose gradients point the same way are predicted by the same mechanism (app. G.3, after Michaud et al. 2023).
They are compared in a few thousand random dimensions: the projection is a random matrix R with entries -1, 0 and 1.

1. A linear layer's gradient for an example is a sum over positions of outer products: what went in, times the loss's
   gradient by what came out. Both are kept for a batch; the gradient itself is only made for a block of parameters.
2. R is made for that block, from a seed of its own, used, and forgotten. It is never whole in memory.

Parameters are those of all linear layers, weights and biases. Embeddings, the unembedding and norms are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from unweave.attribute.runner import Metric, Runner
from unweave.attribute.states import SAEs, by_site_of, reads_of, values_of
from unweave.core.errors import UnweaveError
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.lm.taps import At
from unweave.methods.behaviours.cluster import Vectors
from unweave.methods.behaviours.contexts import batches, order_of
from unweave.methods.behaviours.result import Example
from unweave.methods.behaviours.spec import VectorOptions
from unweave.sae.module import SAE

Positions = Literal["last", "last-5", "sum"]
SPARSE = ("latents", "effects-latents")
_FEW = 5


def vectors(
    lm: LM,
    saes: SAEs,
    examples: Sequence[Example],
    options: VectorOptions | None = None,
    *,
    skip_first: int = 1,
    seed: int = 0,
    max_tokens: int = 1024,
) -> Vectors:
    """One row per example, in their order: float32 [N, D], as a SciPy CSR array for latents and effects of latents.

    D is the sum over sites (in execution order) of the site's width or its number of latents, five times that for
    ``last-5`` (the last position first; zeros where a context is shorter), and ``dimensions`` for gradients.
    ``skip_first`` tokens of a context count nothing in a sum: the first is often an attention sink, whose values dwarf
    all others. ``seed`` is of the projection. ``max_tokens`` bounds one forward pass.

    Raises UnweaveError for no examples, and NaN.
    """
    if not examples:
        raise UnweaveError("there are no contexts to make vectors of", remedy="find some first")
    options = options or VectorOptions()
    kind = options.kind
    order = order_of(examples, max_tokens=max_tokens)
    whole = batches(lm, examples, max_tokens=max_tokens)
    by_site = by_site_of(lm, saes) if kind != "gradients" else {}
    parts = []
    with task(f"vectors: {kind}", total=len(examples), unit="contexts") as shown:
        for clean, _, metric in whole:
            tokens = clean.to(lm.device)
            if kind == "gradients":
                new = projected_gradients(
                    lm, tokens, metric, dimensions=options.dimensions, density=options.density, seed=seed
                )
            else:
                new = _of_sites(lm, by_site, tokens, metric, options, skip_first)
            values = new.data if sp.issparse(new) else new
            if not np.isfinite(values).all():
                raise UnweaveError(f"the {kind} of a context hold NaN or infinity", remedy="load the model in float32")
            parts.append(new)
            shown.advance(len(tokens))
    return joined(parts)[np.argsort(np.asarray(order))]


def joined(parts: Sequence[Vectors]) -> Vectors:
    """Rows of several, one below the other."""
    if sp.issparse(parts[0]):
        return sp.csr_array(sp.vstack(parts, format="csr"))
    return np.concatenate(parts)


def to_tensors(rows: Vectors) -> dict[str, Tensor]:
    """Rows as tensors, for files."""
    if not sp.issparse(rows):
        return {"rows": torch.from_numpy(np.ascontiguousarray(rows))}
    columns = {"values": rows.data, "columns": rows.indices, "starts": rows.indptr, "shape": np.asarray(rows.shape)}
    return {name: torch.from_numpy(array) for name, array in columns.items()}


def from_tensors(held: Mapping[str, Tensor]) -> Vectors:
    """What ``to_tensors`` was given."""
    arrays = {name: tensor.numpy() for name, tensor in held.items()}
    if "rows" in arrays:
        return arrays["rows"]
    return sp.csr_array((arrays["values"], arrays["columns"], arrays["starts"]), shape=tuple(arrays["shape"].tolist()))


def _of_sites(
    lm: LM, by_site: Mapping[Site, SAE], tokens: Tokens, metric: Metric, options: VectorOptions, skip_first: int
) -> Vectors:
    kind, positions = options.kind, options.positions
    reads = {reads_of(sae, site) for site, sae in by_site.items()} if kind in SPARSE else set()
    gradients: dict[Site, Tensor] = {}
    if kind.startswith("effects"):
        gradients, values = Runner(lm, tokens, metric, tokens.ids.numel()).gradients(list(by_site), reads)
    else:
        values = values_of(lm, {*by_site, *reads}, tokens, max_tokens=tokens.ids.numel())
    where, counted = _places(tokens.mask, positions, skip_first)
    blocks = []
    for site, sae in by_site.items():
        x = _at(values[site], where)
        if kind in SPARSE:
            source = _at(values[reads_of(sae, site)], where)
            with torch.no_grad():
                counting = sae.policy.keep(source, tokens.ids.gather(1, where), counted)
                vector = sae.encode(source) * counting.unsqueeze(-1)
        else:
            vector = x
        if gradients:
            g = _at(gradients[site], where).to(vector.dtype)
            vector = -vector * (g @ sae.W_dec.T if kind in SPARSE else g)
        vector = (vector * counted.unsqueeze(-1)).float()
        block = (vector.sum(1) if positions == "sum" else vector.flatten(1)).cpu().numpy()
        blocks.append(sp.csr_array(block) if kind in SPARSE else block)
    return sp.hstack(blocks, format="csr") if kind in SPARSE else np.concatenate(blocks, 1)


def _places(mask: Tensor, positions: Positions, skip_first: int) -> tuple[Tensor, Tensor]:
    """Positions int64 [B, K] that are looked at, and whether each counts, bool [B, K]. Padding is on the right."""
    n = mask.sum(1, keepdim=True)
    if positions == "sum":
        where = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        return where, mask & (where >= skip_first)
    back = torch.arange(1 if positions == "last" else _FEW, device=mask.device)
    where = n - 1 - back
    return where.clamp(min=0), where >= 0


def _at(x: Tensor, where: Tensor) -> Tensor:
    return x.gather(1, where.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


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
    at = _nonzero(rng, total, density)
    signs = (2 * rng.integers(0, 2, len(at), dtype=np.int8) - 1).astype(np.float32)
    rows, columns = np.divmod(at, dimensions)
    starts = np.searchsorted(rows, np.arange(n + 1))
    return sp.csr_array((signs, columns.astype(np.int32), starts.astype(np.int32)), shape=(n, dimensions))


def _nonzero(rng: np.random.Generator, total: int, density: float) -> np.ndarray:
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
