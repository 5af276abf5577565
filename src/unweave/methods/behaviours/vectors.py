"""What a model does with a context, as one vector, so that contexts can be compared (Marks et al. 2024, app. G.2).

    activations      the sites' own values, side by side
    latents          the SAEs' latents there; sparse
    effects-dense    gradient x (0 - activation): the linear estimate of ablating each coordinate
    effects-latents  the same of each latent; sparse
    gradients        the gradient of the loss by the model's parameters, projected (``gradients.py``)

The metric of effects and gradients is m = -log p(answer). All but gradients are taken at the last position, at the last
five, or summed over all but the first ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from unweave.attribute.runner import Metric, Runner
from unweave.attribute.states import SAEs, by_site_of, reads_of, values_of
from unweave.core.errors import UnweaveError
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.methods.behaviours.cluster import Vectors
from unweave.methods.behaviours.contexts import batches, order_of
from unweave.methods.behaviours.gradients import projected_gradients
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
