"""Faithfulness and completeness of a circuit at every size: thresholds from all nodes down to none (Fig. 3).

At each threshold the circuit's nodes with a larger |effect| are kept, from the start layer on. Errors are nodes as any
other ("default"), or all kept, or all removed, or removed at attention and MLP sites only, where the residual stream's
stay nodes as any other. Beside each circuit stand random ones: as many latents and as many errors, drawn among those
whose effect is not 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from unweave.attribute.runner import Batch
from unweave.attribute.states import SAEs
from unweave.circuits.about import AblationOptions, Means
from unweave.circuits.faithfulness import Ablated, ablate_outside, ablated_sites
from unweave.circuits.graph import Circuit
from unweave.core.errors import UnweaveError
from unweave.core.rules import at_least
from unweave.core.site import Site
from unweave.lm.model import LM
from unweave.methods.circuits.result import Errors, RandomNodes, Row, Sweep


@dataclass(frozen=True, kw_only=True)
class SweepOptions(AblationOptions):
    """How a circuit is measured at every size."""

    errors: Errors = "default"
    """What happens to errors: nodes as any other, all kept, all removed, or removed at attention and MLPs."""
    draws: Annotated[int, at_least(0)] = 1
    """How many circuits of random nodes to measure beside each; 0 for none."""
    seed: int = 0
    """Choice of random nodes."""


DEFAULT = SweepOptions()
PAPER_THRESHOLDS = tuple(10 ** (-4 + 4 * i / 14) for i in range(15))
"""15, log-spaced from 1e-4 to 1"""


def sweep(
    lm: LM,
    saes: SAEs,
    batches: Sequence[Batch],
    circuit: Circuit,
    options: SweepOptions = DEFAULT,
    thresholds: Sequence[float] = PAPER_THRESHOLDS,
) -> Sweep:
    """F of the circuit at each threshold, of everything but it, and of ``draws`` random circuits of its size.

    ``batches`` should be others than those the circuit was found on; ``skip_first`` should be as in the search. Single
    texts of a circuit without positions are of any length, so their means are taken over all tokens; others' position
    by position. Raises UnweaveError where the circuit misses a site, or m(M) = m(empty).
    """
    if not thresholds or not all(t >= 0 for t in thresholds):
        raise UnweaveError("a sweep needs thresholds of at least 0", remedy="give at least one")
    errors, draws = options.errors, options.draws
    sites = ablated_sites(lm, saes, options.start_layer)
    effects = {site: circuit.nodes[site].to(lm.device) for site in sites if site in circuit.nodes}
    if len(effects) < len(sites):
        missing = ", ".join(str(site) for site in sites if site not in effects)
        raise UnweaveError(f"the circuit has no effects at {missing}", remedy="use the SAEs that it was found with")
    generator = torch.Generator().manual_seed(options.seed)
    ordered = sorted(set(thresholds))
    above = [{site: e.abs() > threshold for site, e in effects.items()} for threshold in ordered]
    circuits = [_handled(kept, errors) for kept in above]
    others = [_handled({site: ~k for site, k in kept.items()}, errors) for kept in above]
    places = _places(effects) if draws else []
    drawn = [_handled(_drawn(places, kept, generator), errors) for kept in above for _ in range(draws)]
    single = all(patch is None for _, patch, _ in batches)
    means: Means = "tokens" if single and not circuit.positions else "positions"
    measured = ablate_outside(lm, saes, batches, [*circuits, *others, *drawn], options, means)
    return Sweep(
        neurons=circuit.about.neurons,
        errors=errors,
        rows=_rows(measured, ordered, circuits, draws),
        model=float(measured.model.mean()),
        empty=float(measured.empty.mean()),
        examples=len(measured.model),
        start_layer=options.start_layer,
        ablation=options.ablation,
        means=means,
        skip_first=options.skip_first,
        changing=sum(int((e != 0).sum()) for e in effects.values()),
    )


def _rows(
    measured: Ablated, thresholds: Sequence[float], circuits: Sequence[Mapping[Site, Tensor]], draws: int
) -> tuple[Row, ...]:
    """A row for each threshold, of the circuits, then all others of theirs, then the random ones."""
    f = measured.faithfulness.double().tolist()
    n = len(thresholds)
    rows = []
    for i, threshold in enumerate(thresholds):
        latents, in_errors = _counted(circuits[i])
        drawn = f[2 * n + i * draws : 2 * n + (i + 1) * draws]
        random = RandomNodes(sum(drawn) / draws, min(drawn), max(drawn), draws) if draws else None
        rows.append(Row(threshold, latents + in_errors, latents, in_errors, f[i], f[n + i], random))
    return tuple(rows)


def spread_thresholds(circuit: Circuit, sites: Sequence[Site], n: int = 15) -> list[float]:
    """Thresholds at which the numbers of nodes are log-spaced, from every changing node at ``sites`` to one.

    Effects of other tasks and models have other sizes; these thresholds show every circuit from all to nothing.
    """
    sizes = torch.cat([circuit.nodes[site].abs().flatten() for site in sites])
    values = sizes[sizes > 0].sort(descending=True).values
    if not len(values):
        raise UnweaveError("no node at these sites has an effect", remedy="take an earlier start layer")
    counts = sorted({round(len(values) ** (i / (n - 1))) for i in range(n)})
    # Between neighbours, so that rounding decides nothing; below the smallest effect: all of them.
    below = torch.cat([values, values.new_zeros(1)])
    return [float((below[k - 1].double() + below[k].double()) / 2) for k in counts]


def _handled(kept: Mapping[Site, Tensor], errors: Errors) -> dict[Site, Tensor]:
    """Kept sets with their errors as ``errors`` says."""
    handled = {}
    for site, nodes in kept.items():
        nodes = nodes.clone()
        residual = site.point in ("embed", "resid_pre", "resid_mid", "resid_post")
        if errors == "keep":
            nodes[:, -1] = True
        elif errors == "remove" or (errors == "remove-attn-mlp" and not residual):
            nodes[:, -1] = False
        handled[site] = nodes
    return handled


def _places(effects: Mapping[Site, Tensor]) -> list[Tensor]:
    """Where latents, and where errors, have an effect that is not 0: (number of the site, position, slot), [n, 3]."""
    places: tuple[list[Tensor], list[Tensor]] = ([], [])
    for number, e in enumerate(effects.values()):
        at = (e != 0).nonzero().cpu()
        at = torch.cat([torch.full_like(at[:, :1], number), at], 1)
        error = at[:, 2] == e.shape[1] - 1
        places[0].append(at[~error])
        places[1].append(at[error])
    return [torch.cat(several) for several in places]


def _drawn(places: Sequence[Tensor], kept: Mapping[Site, Tensor], generator: torch.Generator) -> dict[Site, Tensor]:
    """As many random latents and errors as are kept, among ``places``."""
    drawn = {site: torch.zeros_like(nodes) for site, nodes in kept.items()}
    for n, at in zip(_counted(kept), places, strict=True):
        chosen = at[torch.randperm(len(at), generator=generator)[:n]]
        for number, nodes in enumerate(drawn.values()):
            _, position, slot = chosen[chosen[:, 0] == number].to(nodes.device).unbind(1)
            nodes[position, slot] = True
    return drawn


def _counted(kept: Mapping[Site, Tensor]) -> tuple[int, int]:
    return (
        sum(int(nodes[:, :-1].sum()) for nodes in kept.values()),
        sum(int(nodes[:, -1].sum()) for nodes in kept.values()),
    )
