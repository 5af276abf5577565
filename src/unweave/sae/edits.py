"""What an SAE can do to an activation while the model runs. Edits cost what they touch.

    clamp              x + sum_j (c_j - f_j(x)) d_j
    min-clamp, cap     the same where f_j(x) is smaller, or larger, than c_j; else x
    add                x + sum_j c_j d_j
    multiply           x + sum_j (c_j - 1) f_j(x) d_j;  ablate (zero) is c_j = 0
    project            x - c Q^T Q x, with Q [r, D] orthonormal rows that span the latents' directions;  ablate (span)
    reconstruct        decode(encode(x))

The part that the SAE does not explain stays in all but the last, because only differences are added (trap 37). An edit
of S latents needs S encoder rows and S decoder rows; a TopK SAE must also find which latents win, and does that once.
Where inputs are normalised token by token, a latent's part is scaled by the token's own factor (``input_norm``).
By default an edit leaves alone the tokens that the SAE was not trained on: padding, special tokens, attention sinks.

A strength c_j is a number, or a tensor [B] with one per row of the batch, in which NaN leaves that latent alone in that
row. So one batch holds many strengths of many latents, and unedited rows; ``together`` builds its edits.

Gradients flow through an edit as through the formula: under ablation a latent's own encoder row is taken off too, where
it fires: g - sum_j (g . d_j) w_j. Only [B, P, S] numbers of S latents are kept for the backward pass. ``flow`` cuts the
edit to its value (``forward``: gradients pass as if unedited) or to its gradient (``gradient``: the value is x itself).
Everything is computed in the SAE's dtype, also under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.at import At
from unweave.sae.subset import Subset, finite, numbers, orthonormal_basis
from unweave.sae.where import Fires, Where, roles_of, tokens_where

if TYPE_CHECKING:
    from unweave.lm.model import LM
    from unweave.sae.module import SAE

Mode = Literal["clamp", "add", "multiply", "project", "cap", "min-clamp"]
MODES: tuple[Mode, ...] = get_args(Mode)
Strength = float | Tensor
"""a number, or one per row of the batch [B], where NaN leaves the row alone"""
Flow = Literal["both", "forward", "gradient"]

__all__ = [
    "MODES",
    "Change",
    "Edit",
    "Fires",
    "Flow",
    "Mode",
    "Strength",
    "Subset",
    "Where",
    "finite",
    "orthonormal_basis",
]

_DIFFERENCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "clamp": lambda f, c: c - f,
    "min-clamp": lambda f, c: (c - f).clamp(min=0),
    "cap": lambda f, c: (c - f).clamp(max=0),
    "add": lambda f, c: c,
    "multiply": lambda f, c: (c - 1) * f,
}
"""what is added to a latent with value f, by mode"""


@dataclass(frozen=True)
class Edit:
    """An edit that knows its site: pass it to ``lm.taps(edit=...)`` or ``lm.generate(edit=...)``."""

    name: str
    sae: SAE
    added: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(what the SAE reads, what it writes to, the tokens to edit bool [B, P]) -> what is added to the second"""
    where: Where
    when: Fires | None = None
    share: float = 1.0
    """how much of it is added"""
    flow: Flow = "both"

    def __post_init__(self) -> None:
        roles_of(self.where)

    @property
    def site(self) -> Site:
        if self.sae.write is None:
            raise UnweaveError("this SAE's file named no site", remedy='name it: sae.at("resid_post.9")')
        return self.sae.write

    @property
    def needs(self) -> tuple[Site, ...]:
        sites = [self.sae.read or self.site, *([] if self.when is None else [self.when.site])]
        return tuple(site for site in dict.fromkeys(sites) if site != self.site)

    def verify(self, lm: LM) -> None:
        """Refuses a model that is not the SAE's, and a condition that comes too late."""
        self.sae.verify(lm)
        if self.when is not None:
            self.when.verify(lm, self.site)

    def __call__(self, x: Tensor, at: At) -> Tensor | None:
        def value(site: Site | None) -> Tensor:
            return at.read[site] if site in self.needs else x

        source, recorded = value(self.sae.read), torch.is_grad_enabled() and self.flow != "forward"
        with torch.autocast(x.device.type, enabled=False):
            with torch.no_grad():
                tokens = tokens_where(self.where, self.sae.policy, source, at)
                if self.when is not None:
                    tokens = self.when.holds(value(self.when.site), at, tokens)
            with torch.set_grad_enabled(recorded):
                added = self.added(source, x, tokens)
                added = added if self.share == 1 else added * self.share
            if self.flow == "gradient":
                added = added - added.detach()
            return (x + added).to(x.dtype)

    def __repr__(self) -> str:
        return f"{self.name} at {self.sae.write}"


@dataclass(frozen=True)
class Change:
    """What is done to one latent in one row of a batch."""

    sae: SAE
    latent: int
    value: float
    """the strength, in the latent's own units; of ``multiply`` and ``project`` a factor"""
    mode: Mode = "clamp"
    where: Where = "policy"
    when: Fires | None = None


def together(rows: Sequence[Sequence[Change]]) -> list[Edit]:
    """The edits of a batch whose row b has the changes ``rows[b]``. A row's own order holds, whatever the other rows'.

    Changes of a row that differ only in latent and value are one edit, in the place of their first; directions that a
    row projects out are one span. Rows share edits where their orders allow it.
    """
    edits: list[tuple[object, Change, dict[int, Tensor]]] = []
    for b, changes in enumerate(rows):
        kinds: dict[tuple[object, ...], list[Change]] = {}
        for change in changes:
            kinds.setdefault(_kind(change), []).append(change)
        behind = 0
        for kind, alike in kinds.items():
            key = (kind, {one.latent for one in alike} if alike[0].mode == "project" else None)
            place = next((i for i in range(behind, len(edits)) if edits[i][0] == key), len(edits))
            if place == len(edits):
                edits.append((key, alike[0], {}))
            behind = place + 1
            for change in alike:
                nowhere = torch.full((len(rows),), torch.nan, dtype=torch.float64)
                value = edits[place][2].setdefault(change.latent, nowhere)
                if not value[b].isnan() or finite(change.value) is None:
                    what = f"latent {change.latent} of row {b} is set twice, or to {change.value!r}"
                    raise UnweaveError(what, remedy="give one finite value")
                value[b] = change.value
    return [edit(one.sae, one.mode, values, one.where, one.when) for _, one, values in edits]


def _kind(change: Change) -> tuple[object, ...]:
    """Equal for changes that one edit can make."""
    where = change.where if isinstance(change.where, Hashable) else tuple(change.where)
    return change.sae, change.mode, where, change.when


def _strengths(sae: SAE, values: Mapping[int, Strength]) -> Tensor:
    """The values in the SAE's dtype, [S], or [B, 1, S] where some are given by row. UnweaveError for what is not
    finite there; NaN may stand in a row."""
    if not isinstance(values, Mapping):
        raise UnweaveError(f"{values!r} does not say which latents get which values", remedy="pass {latent: value}")
    if not values:
        raise UnweaveError("no latents were named", remedy="pass {latent: value}")
    dtype, device = sae.W_dec.dtype, sae.W_dec.device
    columns: list[Tensor] = []
    for latent, value in values.items():
        if isinstance(value, Tensor) and value.ndim == 1 and len(value) and value.dtype != torch.bool:
            column = value.detach().double()
        else:
            number = finite(value)
            column = torch.tensor(torch.inf if number is None else number, dtype=torch.float64)
        if bool((column.abs() > torch.finfo(dtype).max).any()):
            shown = value.tolist() if isinstance(value, Tensor) else value
            remedy = f"give a finite number within the range of {dtype}, or a tensor with one for each row"
            raise UnweaveError(f"the value for latent {latent!r} is {shown!r}", remedy=remedy)
        columns.append(column.to(device, dtype))
    if not any(column.ndim for column in columns):
        return torch.stack(columns)
    sizes = {len(column) for column in columns if column.ndim}
    if len(sizes) > 1:
        raise UnweaveError(f"strengths are given for {sorted(sizes)} rows", remedy="give one per row of the batch")
    return torch.stack([column.expand(*sizes) for column in columns], -1).unsqueeze(1)


def edit(
    sae: SAE, mode: Mode, values: Mapping[int, Strength], where: Where = "policy", when: Fires | None = None
) -> Edit:
    """See ``SAE.edit``."""
    if mode not in MODES:
        raise UnweaveError(f"unknown way to steer {mode!r}", remedy=f"use one of {', '.join(MODES)}")
    sae.require_decoder()
    strengths, subset = _strengths(sae, values), Subset(sae, list(values))
    added = (_projection if mode == "project" else _difference)(mode, subset, strengths)
    named = {
        latent: "by row" if isinstance(value, Tensor) and value.ndim else value for latent, value in values.items()
    }
    return Edit(f"{mode} {named}", sae, added, where, when)


def _difference(mode: str, subset: Subset, strengths: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    edited, c = ~strengths.isnan(), strengths.nan_to_num()

    def added(source: Tensor, x: Tensor, tokens: Tensor) -> Tensor:
        _check_rows(strengths, x)
        f = c if mode == "add" else subset.encode(source)
        difference = torch.where(edited & tokens.unsqueeze(-1), _DIFFERENCE[mode](f, c), 0.0)
        return subset.writes(difference, source)

    return added


def _projection(mode: str, subset: Subset, strengths: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    basis, share = subset.span(), strengths[..., :1].nan_to_num()
    if not torch.equal(strengths.nan_to_num(), share.expand_as(strengths)):
        remedy = "give all the same: 1 takes their span away, 0.5 halves it"
        raise UnweaveError(f"latents that are projected out together have different strengths ({mode})", remedy=remedy)

    def added(source: Tensor, x: Tensor, tokens: Tensor) -> Tensor:
        del source
        _check_rows(strengths, x)
        return torch.where(tokens.unsqueeze(-1), -share * (x.to(basis.dtype) @ basis.T), 0.0) @ basis

    return added


def _check_rows(strengths: Tensor, x: Tensor) -> None:
    if strengths.ndim == 3 and len(strengths) not in (1, len(x)):
        remedy = "give one per row of the batch, or one for all"
        raise UnweaveError(f"strengths are given for {len(strengths)} rows, and the batch has {len(x)}", remedy=remedy)


def ablate(
    sae: SAE,
    latents: Iterable[int],
    mode: Literal["zero", "span"] = "zero",
    where: Where = "policy",
    when: Fires | None = None,
) -> Edit:
    """See ``SAE.ablate``."""
    if mode not in ("zero", "span"):
        raise UnweaveError(f"unknown way to ablate {mode!r}", remedy="use mode zero or span")
    chosen = numbers(latents)
    if not chosen:
        raise UnweaveError("no latents were named", remedy="pass the numbers of latents")
    Subset(sae, chosen)  # refuses a latent that is named twice
    how: tuple[Mode, float] = ("multiply", 0.0) if mode == "zero" else ("project", 1.0)
    one = edit(sae, how[0], dict.fromkeys(chosen, how[1]), where, when)
    return replace(one, name=f"ablate ({mode}) {chosen}")


def reconstruct(sae: SAE, where: Where = "policy") -> Edit:
    """See ``SAE.reconstruct``."""
    sae.require_decoder()

    def added(source: Tensor, x: Tensor, tokens: Tensor) -> Tensor:
        return torch.where(tokens.unsqueeze(-1), sae.reconstruct_sparsely(source) - x, 0.0)

    return Edit("reconstruct", sae, added, where)
