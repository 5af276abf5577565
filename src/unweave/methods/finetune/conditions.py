"""What is done to chosen latents, or directions, while a model learns: the conditions of concept ablation fine-tuning.

At a site with activation x, chosen latents S of its SAE with values f_j, directions d_j and encoder rows w_j:

    zero       x - s sum_S f_j(x) d_j                   latents zeroed, the SAE's error kept (the paper's words)
    mean       x - s sum_S (f_j(x) - m_j) d_j           m_j: the mean of f_j on the base model
    span       x - s Q^T Q x                            Q: orthonormal rows that span the d_j (the paper's code)
    prevent    x + s sum_S r_j d_j                      r_j: root mean square of f_j where it fires on the base model
    penalty    loss + s / T sum_t sum_S relu(f_j(x_t) - f_j(base x_t))^2   t: of T tokens those that the policy counts
    inoculate  a line in front of every training prompt

s is ``strength``, times the training's progress p (fade in) or 1 - p (fade out). ``m_j`` and ``r_j`` come from the
training texts, over tokens that the SAE's policy counts, but for the one that begins a text. The penalty is one-sided,
as BLOCK-EM's (Ustaomeroglu and Qu 2026): a latent may fall, and what it does on the base model at the same token is
free.

The gradient is that of the formula. Under ``zero`` a cotangent g becomes g - s sum_S 1[f_j > 0] (g . d_j) w_j: where
f_j fires, the layers below are not told what it should be, since it has no effect; where it is silent, their gradient
is untouched, and may well make it fire. Under ``span`` it becomes g - s Q^T Q g at every token.

Directions (principal components, random ones) are latents that are linear: f_c(x) = u_c . x with u_c of length 1.
For ``mean`` the u_c are made orthonormal first, so that x - s Q^T Q (x - mean x) comes out; ``zero`` would be ``span``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unweave.attribute.states import counted
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.latents.selection import Selection
from unweave.lm.model import LM, Tokens
from unweave.lm.taps import Start
from unweave.methods.finetune.spec import ConditionSpec
from unweave.sae.edits import Edit, Mode
from unweave.sae.module import SAE
from unweave.sae.neurons import linear_latents
from unweave.sae.subset import Subset, orthonormal_basis


class Usual(NamedTuple):
    """What chosen latents of a site do on the base model's training texts, over tokens that count."""

    mean: Tensor
    """[S]"""
    size: Tensor
    """root mean square where not zero, [S]; 0 for a latent that never fires"""


@dataclass(frozen=True)
class Condition:
    """A condition, ready to train under: ``lm.taps(edit=condition.edits(p), read=condition.reads, grad=True)`` around
    the forward and the backward pass (under gradient checkpointing the latter computes activations again)."""

    spec: ConditionSpec
    chosen: Mapping[Site, Subset] = field(default_factory=dict)
    """what was chosen, by the site that is written to"""
    full: tuple[Edit, ...] = ()
    """the edits at their full strength, as an evaluation takes them"""
    usual: Mapping[Site, Usual] = field(default_factory=dict)
    """of the kinds ``mean`` and ``prevent``"""

    def edits(self, progress: float) -> list[Edit]:
        """The edits of a training step at ``progress`` (0: the first, 1: the last)."""
        share = self._strength(progress)
        if self.spec.when == "test" or share == 0:
            return []
        return [replace(edit, share=share, flow=self.spec.flow) for edit in self.full]

    @property
    def ablates(self) -> bool:
        """Whether its edits take something away, which can be tried on a model that is not trained, or at test."""
        return bool(self.full) and self.spec.kind != "prevent"

    @property
    def reads(self) -> tuple[Site, ...]:
        """The sites that the penalty reads."""
        if self.spec.kind != "penalty":
            return ()
        return tuple(dict.fromkeys(_read(subset.sae) for subset in self.chosen.values()))

    def values(self, read: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        """The chosen latents' values [B, P, S] by site, of activations ``read`` [B, P, D] at ``reads``."""
        with torch.autocast(next(iter(read.values())).device.type, enabled=False):
            return {site: subset.encode(read[_read(subset.sae)]) for site, subset in self.chosen.items()}

    def penalty(
        self, read: Mapping[Site, Tensor], tokens: Tokens, base: Mapping[Site, Tensor], progress: float
    ) -> Tensor | None:
        """What to add to the loss; None but for the kind ``penalty``.

        ``read`` is what the taps saw at ``reads``, ``base`` the base model's ``values`` of the same tokens (of another
        pass: ``base_values``). Parts of a batch add up to the whole, each weighted by its share of the tokens.
        """
        if self.spec.kind != "penalty":
            return None
        total = torch.zeros((), device=tokens.ids.device)
        for site, f in self.values(read).items():
            sae = self.chosen[site].sae
            counts = sae.policy.keep(read[_read(sae)].detach(), tokens.ids, tokens.mask)
            excess = torch.relu(f - base[site].to(f.dtype)).square().sum(-1)
            total = total + torch.where(counts, excess, 0.0).sum()
        return total * (self._strength(progress) / tokens.n_tokens)

    def prompt(self, text: str) -> str:
        """A training prompt under this condition."""
        return f"{self.spec.line}\n{text}" if self.spec.kind == "inoculate" else text

    def _strength(self, progress: float) -> float:
        share = {"none": 1.0, "in": progress, "out": 1.0 - progress}[self.spec.fade]
        return self.spec.strength * share


def open_condition(
    spec: ConditionSpec,
    selection: Selection | None,
    lm: LM,
    saes: Mapping[Site, SAE],
    texts: Iterable[Tokens] = (),
) -> Condition:
    """A condition on what ``selection`` chose. ``lm`` must still be the base model, and SAEs be made for it.

    ``texts`` are batches of the training texts, read for the kinds ``mean`` and ``prevent`` alone. Raises UnweaveError
    where nothing is selected, for a site whose SAE is missing or another, and for a kind that cannot be.
    """
    if spec.kind in ("none", "inoculate"):
        return Condition(spec)
    if selection is None:
        raise UnweaveError(f"kind {spec.kind} needs a selection", remedy="give one: unweave finetune select")
    selection.check(saes)
    chosen = _chosen(spec, selection, lm, saes)
    for subset in chosen.values():
        subset.sae.verify(lm)
        if spec.kind != "penalty":
            subset.sae.require_decoder()
    usual = usual_values(lm, chosen, texts) if spec.kind in ("mean", "prevent") else {}
    if spec.kind == "prevent" and not any(bool(one.size.any()) for one in usual.values()):
        raise UnweaveError("no chosen latent fires on the training texts, so there is nothing to add")
    how: dict[str, Mode] = {"zero": "multiply", "mean": "clamp", "span": "project", "prevent": "add"}
    full = []
    for site, subset in chosen.items() if spec.kind in how else ():
        target = {"zero": torch.zeros(len(subset.latents)), "span": torch.ones(len(subset.latents))}.get(spec.kind)
        if target is None:
            target = usual[site].mean if spec.kind == "mean" else usual[site].size
        values = dict(zip(subset.latents.tolist(), target.tolist(), strict=True))
        full.append(replace(subset.sae.edit(how[spec.kind], values, where=spec.where), share=spec.strength))
    return Condition(spec, chosen, tuple(full), usual)


def _read(sae: SAE) -> Site:
    assert sae.read is not None  # verified before
    return sae.read


def _chosen(spec: ConditionSpec, selection: Selection, lm: LM, saes: Mapping[Site, SAE]) -> dict[Site, Subset]:
    if selection.kind == "latents":
        return {site: saes[site].subset(numbers) for site, numbers in selection.latents.items()}
    if spec.kind == "zero":
        raise UnweaveError("directions have no latents to zero", remedy="use kind span, which projects them out")
    chosen = {}
    for site, rows in selection.directions.items():
        unit = F.normalize(rows.to(lm.device, torch.promote_types(rows.dtype, torch.float32)), dim=1)
        policy = saes[site].policy if site in saes else TokenPolicy(lm.special_ids)
        sae = linear_latents(orthonormal_basis(unit) if spec.kind == "mean" else unit, site, policy)
        chosen[site] = sae.subset(range(sae.d_sae))
    return chosen


def base_values(lm: LM, condition: Condition, tokens: Tokens, start: Start | None = None) -> dict[Site, Tensor]:
    """The chosen latents' values [B, P, S] by site, of a model that is still the base: for ``Condition.penalty``.
    ``start``: where the pass begins, and with what."""
    with lm.taps(read=condition.reads, stop=max(condition.reads), start=start) as seen, torch.no_grad():
        lm(tokens)
        return condition.values(seen)


def usual_values(lm: LM, chosen: Mapping[Site, Subset], texts: Iterable[Tokens]) -> dict[Site, Usual]:
    """What chosen latents do on ``texts``, over tokens that count (``counted``). UnweaveError for none."""
    reads = {site: _read(subset.sae) for site, subset in chosen.items()}
    sums = {site: torch.zeros(3, len(one.latents), dtype=torch.float64) for site, one in chosen.items()}
    n = dict.fromkeys(chosen, 0)
    for tokens in texts:
        with lm.taps(read=reads.values(), stop=max(reads.values())) as seen:
            lm(tokens)
        tokens = tokens.to(lm.device)
        for site, subset in chosen.items():
            x = seen[reads[site]]
            f = subset.encode(x[counted(lm, subset.sae, x, tokens)]).double()
            sums[site] += torch.stack([f.sum(0), f.square().sum(0), (f != 0).double().sum(0)]).cpu()
            n[site] += len(f)
    if empty := [str(site) for site in chosen if n[site] == 0]:
        what = "the training texts have no token that the SAE counts"
        raise UnweaveError(what, where=", ".join(empty), remedy="give the texts that training will read")
    return {
        site: Usual(total / n[site], (square / fires.clamp(min=1)).sqrt())
        for site, (total, square, fires) in sums.items()
    }
