"""The obvious way to a circuit, as an oracle and as what benchmarks compare with: loops over sites, steps and nodes.

Nodes: for every site and every point of the path a forward and a backward pass of the whole batch. Edges: one forward
pass in which every node is a leaf of the graph, then one backward pass per retained downstream node, which asks for
nothing but the leaves that it reaches. Nothing here uses what the package does with circuits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.sae.module import SAE


@dataclass
class Leaves:
    """The nodes of one site: functions of what lies before (``latents``, ``error``), and leaves of what follows."""

    latents: Tensor
    error: Tensor
    latents_leaf: Tensor
    error_leaf: Tensor


def last_logits(lm: LM, tokens: Tokens) -> Tensor:
    """Logits [B, V] at each row's last token."""
    width = tokens.ids.shape[1]
    last = width - 1 - tokens.mask.flip(1).int().argmax(1)
    keep = width - int(last.min())
    logits = lm(tokens, keep_logits=keep)
    assert logits is not None
    return logits[torch.arange(len(tokens), device=logits.device), last - (width - keep)]


def site_values(lm: LM, saes: Mapping[Site, SAE], tokens: Tokens) -> dict[Site, tuple[Tensor, Tensor, Tensor]]:
    """Value, latents and error of every site."""
    reads = {site: sae.read or site for site, sae in saes.items()}
    with lm.taps(read=sorted({*reads, *reads.values()})) as seen:
        lm(tokens)
    found = {}
    for site, sae in saes.items():
        kept = sae.policy.keep(seen[reads[site]], tokens.ids, tokens.mask)
        latents = sae.encode(seen[reads[site]]) * kept.unsqueeze(-1)
        error = seen[site].to(latents.dtype) - sae.decode(latents)
        if sae.W_skip is not None:
            error = error - seen[reads[site]] @ sae.W_skip * kept.unsqueeze(-1)
        found[site] = (seen[site], latents, error)
    return found


def node_gradients(
    lm: LM,
    sites: Sequence[Site],
    starts: Mapping[Site, Tensor],
    ends: Mapping[Site, Tensor],
    tokens: Tokens,
    metric: Callable[[Tensor, Tensor], Tensor],
    alphas: Sequence[float],
) -> dict[Site, Tensor]:
    """Integrated gradients: the mean gradient [B, P, D] over points from ``starts`` to ``ends``, site by site."""
    rows = torch.arange(len(tokens), device=lm.device)
    found = {}
    for site in sites:
        total = torch.zeros_like(starts[site])
        for alpha in alphas:
            leaf = (starts[site] + alpha * (ends[site] - starts[site])).requires_grad_()
            with torch.enable_grad(), lm.taps(edit={site: lambda x, _at, leaf=leaf: leaf.to(x.dtype)}, grad=True):
                value = metric(last_logits(lm, tokens), rows).sum()
            total += torch.autograd.grad(value, leaf)[0]
        found[site] = total / len(alphas)
    return found


def leaves(lm: LM, saes: Mapping[Site, SAE], tokens: Tokens) -> dict[Site, Leaves]:
    """One forward pass in which every node is a leaf; the model's values stay what they are."""
    found: dict[Site, Leaves] = {}
    reads = {site: sae.read or site for site, sae in saes.items()}

    def cut(x: Tensor, at: object) -> Tensor:
        site = at.site  # type: ignore[attr-defined]
        sae = saes[site]
        source = x if reads[site] == site else at.read[reads[site]]  # type: ignore[attr-defined]
        kept = sae.policy.keep(source.detach(), tokens.ids, tokens.mask)
        latents = sae.encode(source) * kept.unsqueeze(-1)
        skip = 0.0 if sae.W_skip is None else source @ sae.W_skip * kept.unsqueeze(-1)
        error = x.to(latents.dtype) - sae.decode(latents) - skip
        nodes = Leaves(latents, error, latents.detach().requires_grad_(), error.detach().requires_grad_())
        found[site] = nodes
        return (sae.decode(nodes.latents_leaf) + skip + nodes.error_leaf).to(x.dtype)

    others = sorted({read for site, read in reads.items() if read != site})
    with lm.taps(read=others, edit=dict.fromkeys(saes, cut), stop=max(saes), grad=True):
        lm(tokens)
    return found


def edge_rows(
    graph: Mapping[Site, Leaves],
    saes: Mapping[Site, SAE],
    gradients: Mapping[Site, Tensor],
    changes: Mapping[Site, tuple[Tensor, Tensor]],
    retained: Mapping[Site, Sequence[tuple[int, int, int]]],
) -> Iterator[tuple[Site, Site, tuple[int, int, int], Tensor]]:
    """(upstream, downstream, the downstream node (example, position, slot), weights [P, F + 1]), a pass per node.

    ``changes`` are of latents [B, P, F] and errors [B, P, D]; ``gradients`` [B, P, D] the metric's at the sites.
    """
    for down, nodes in retained.items():
        here, g, sae = graph[down], gradients[down], saes[down]
        asked = [site for site in graph if site < down]
        for example, position, slot in nodes:
            if slot < sae.d_sae:
                value = here.latents[example, position, slot] * (g[example, position] @ sae.W_dec[slot])
            else:
                value = here.error[example, position] @ g[example, position]
            if not value.requires_grad:  # nothing lies before
                break
            wanted = [leaf for site in asked for leaf in (graph[site].latents_leaf, graph[site].error_leaf)]
            found = torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True) if wanted else ()
            pairs = [(site, *pair) for site, pair in zip(asked, zip(found[::2], found[1::2], strict=True), strict=True)]
            reached = [(site, a, b) for site, a, b in pairs if a is not None and b is not None]
            asked = [site for site, _, _ in reached]  # the others cannot be reached from this site
            for site, latents, error in reached:
                moved, shifted = changes[site]
                weights = latents[example] * moved[example], (error[example] * shifted[example]).sum(-1, keepdim=True)
                yield site, down, (example, position, slot), torch.cat(weights, -1)
