"""What a model does with a context, as one vector, so that contexts can be compared (Marks et al. 2024, app. G.2).

    activations      the sites' own values, side by side
    latents          the autoencoders' latents there; sparse
    effects-dense    gradient x (0 - activation): the linear estimate of ablating each coordinate
    effects-latents  the same of each latent; sparse
    gradients        the gradient of the loss by the model's parameters, projected (``gradients.py``)

The metric of effects and gradients is m = -log p(answer). All but gradients are taken at the last position, at the last
five, or summed over all but the first ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from unweave.attribute.states import SAEs, by_site_of, reads_of
from unweave.core.errors import UnweaveError
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.lm.taps import At
from unweave.methods.behaviours.behaviours import Example, batches, order_of
from unweave.methods.behaviours.gradients import DENSITY, DIMENSIONS, projected_gradients
from unweave.sae.module import SAE

Kind = Literal["activations", "latents", "effects-dense", "effects-latents", "gradients"]
Positions = Literal["last", "last-5", "sum"]
KINDS: tuple[Kind, ...] = ("activations", "latents", "effects-dense", "effects-latents", "gradients")
SPARSE = ("latents", "effects-latents")
_FEW = 5


def vectors(
    lm: LM,
    saes: SAEs,
    examples: Sequence[Example],
    *,
    kind: Kind = "effects-latents",
    positions: Positions = "sum",
    skip_first: int = 1,
    dimensions: int = DIMENSIONS,
    density: float = DENSITY,
    seed: int = 0,
    max_tokens: int = 1024,
) -> Any:
    """One row per example, in their order: float32 [N, D], as a SciPy CSR array for latents and effects of latents.

    D is the sum over sites (in execution order) of the site's width or its number of latents, five times that for
    ``last-5`` (the last position first; zeros where a context is shorter), and ``dimensions`` for gradients.
    ``skip_first`` tokens of a context count nothing in a sum: the first is often an attention sink, whose values dwarf
    all others. ``dimensions``, ``density`` and ``seed`` are for gradients. ``max_tokens`` bounds one forward pass.

    Raises UnweaveError for unknown kinds, no examples, and NaN.
    """
    if kind not in KINDS or positions not in ("last", "last-5", "sum"):
        raise UnweaveError(f"no vectors are made of {kind!r} at {positions!r}", remedy=f"kinds: {', '.join(KINDS)}")
    if not examples:
        raise UnweaveError("there are no contexts to make vectors of", remedy="find some first")
    order = order_of(examples, max_tokens=max_tokens)
    whole = batches(lm, examples, max_tokens=max_tokens)
    by_site = by_site_of(lm, saes) if kind != "gradients" else {}
    parts = []
    with task(f"vectors: {kind}", total=len(examples), unit="contexts") as shown:
        for clean, _, metric in whole:
            tokens = clean.to(lm.device)
            if kind == "gradients":
                made = projected_gradients(lm, tokens, metric, dimensions=dimensions, density=density, seed=seed)
            else:
                made = _of_sites(lm, by_site, tokens, metric, kind, positions, skip_first)
            values = made.data if sp.issparse(made) else made
            if not np.isfinite(values).all():
                raise UnweaveError(f"the {kind} of a context hold NaN or infinity", remedy="load the model in float32")
            parts.append(made)
            shown.advance(len(tokens))
    back = np.argsort(np.asarray(order))
    return sp.csr_array(sp.vstack(parts, format="csr"))[back] if kind in SPARSE else np.concatenate(parts)[back]


def _of_sites(
    lm: LM, by_site: Mapping[Site, SAE], tokens: Tokens, metric: Any, kind: Kind, positions: Positions, skip_first: int
) -> Any:
    reads = {reads_of(sae, site) for site, sae in by_site.items()} if kind in SPARSE else set()
    if kind.startswith("effects"):
        values, gradients = _with_gradients(lm, list(by_site), reads, tokens, metric)
    else:
        values, gradients = _values(lm, [*by_site, *reads], tokens), {}
    where, counted = _places(tokens.mask, positions, skip_first)
    blocks = []
    for site, sae in by_site.items():
        x = _at(values[site], where)
        if kind in SPARSE:
            source = _at(values[reads_of(sae, site)], where)
            with torch.no_grad():
                kept = sae.policy.keep(source, tokens.ids.gather(1, where), counted)
                found = sae.encode(source) * kept.unsqueeze(-1)
        else:
            found = x
        if gradients:
            g = _at(gradients[site], where).to(found.dtype)
            found = -found * (g @ sae.W_dec.T if kind in SPARSE else g)
        found = (found * counted.unsqueeze(-1)).float()
        block = (found.sum(1) if positions == "sum" else found.flatten(1)).cpu().numpy()
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


def _values(lm: LM, sites: Sequence[Site], tokens: Tokens) -> dict[Site, Tensor]:
    asked = sorted(set(sites))
    stop = None if any(site.point == "path" for site in asked) else asked[-1]
    with lm.taps(read=asked, stop=stop) as seen:
        lm(tokens)
    return {site: seen[site] for site in asked}


def _with_gradients(
    lm: LM, sites: list[Site], reads: set[Site], tokens: Tokens, metric: Any
) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
    """Values of all sites, and the metric's gradients [B, P, D] at ``sites`` from one backward pass."""
    found: dict[Site, Tensor] = {}

    def probe(x: Tensor, at: At) -> Tensor:
        # A node of its own: the model may use the same tensor elsewhere too.
        found[at.site] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        return found[at.site]

    def look(x: Tensor, at: At) -> None:
        found[at.site] = x

    last = tokens.mask.sum(1) - 1
    width = tokens.ids.shape[1]
    keep = width - int(last.min())
    rows = torch.arange(len(tokens), device=lm.device)
    with torch.enable_grad():
        with lm.taps(edit=dict.fromkeys(reads - set(sites), look) | dict.fromkeys(sites, probe), grad=True):
            logits = lm(tokens, keep_logits=keep)
        assert logits is not None
        value = metric(logits[rows, last - (width - keep)].float(), rows).sum()
    gradients = torch.autograd.grad(value, [found[site] for site in sites])
    return {site: x.detach() for site, x in found.items()}, dict(zip(sites, gradients, strict=True))
