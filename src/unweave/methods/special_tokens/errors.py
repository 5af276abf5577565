"""Reconstruction errors on special tokens and by role, of many SAEs from one forward pass (FAST, sections 4.1 and 4.2).

1. Every token that is not padding is of one kind: the special tokens, what else the chat template wrote (line breaks),
   or the words of system, user, assistant or plain text.
2. A batch goes through the model once, up to the last site; every SAE encodes what it reads there and is compared with
   the activation where it writes.
3. What is added up per sequence and kind, in float64, is enough for the paper's error, in which every sequence weighs
   the same (equation 7), and for the plain mean over tokens:

       MSE = (1/N) sum_i (1/L_i) sum_t (1/H) ||x_it - xhat_it||^2

4. Everything is told twice: over all tokens, as the paper does, and without norm outliers. A model's first token is
   often hundreds of times longer than the others (trap 7), and would decide every mean.

An outlier is longer than 10 medians of the norms on these very tokens, so that the limit is known only at the end.
Until then tokens that may turn out to be outliers, the long ones, are held aside with their activations. Should the
guess of "long" have been too high, the pass is repeated with the limits, which are then known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from unweave.attribute.states import values_of
from unweave.core.errors import UnweaveError
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.lm.chat import Role
from unweave.lm.model import LM, Tokens
from unweave.methods.special_tokens.metrics import MeasuredErrors, Sums
from unweave.methods.special_tokens.result import KINDS, METRIC_SET, ByGroup
from unweave.tasks.special_tokens import SpecialTokens

if TYPE_CHECKING:
    from unweave.sae.module import SAE

OUTLIER_RATIO = 10.0
"""Where an SAE's policy sets no limit, tokens longer than this many median norms are outliers."""
_LONG_RATIO = OUTLIER_RATIO / 4
"""Tokens longer than this many medians of the tokens so far are held aside."""
_PIECE_ELEMENTS = 1 << 20
"""So many latents are computed at a time: few enough to stay in the processor's cache."""
_DENSE_SHARE = 8
_SPECIAL = KINDS.index("special")


def special_token_errors(
    lm: LM, saes: Mapping[str, SAE], batches: Sequence[Tokens], *, special: SpecialTokens | None = None
) -> dict[str, MeasuredErrors]:
    """Measures every SAE on batches of tokens with roles, padded on either side; each row is one sequence of the
    paper's mean. ``data.batches.store_batches`` makes batches of a token store.

    ``special`` defaults to ``SpecialTokens.of(lm)``. How rows are put into batches changes nothing beyond rounding. The
    result has the keys of ``saes``, in their order. All real tokens count, also those that an SAE's policy excludes;
    ``notes`` then says so.

    Raises UnweaveError when there is no SAE or no token, when an SAE names no site or was made for another model, and
    when activations or reconstructions are not finite (naming the row).
    """
    if not saes:
        raise UnweaveError("there is no SAE to measure", remedy="give at least one")
    if not any(batch.n_tokens for batch in batches):
        raise UnweaveError("there are no tokens to measure on", remedy="give at least one row")
    special = special or SpecialTokens.of(lm)
    n_rows = sum(len(batch) for batch in batches)
    with torch.no_grad():
        tallies = [_Tally(read, write, group, n_rows) for (read, write), group in _by_sites(lm, saes).items()]
        _pass(lm, tallies, batches, special)
        again = [tally.afresh() for tally in tallies if tally.held_too_few]
        if again:
            _pass(lm, again, batches, special)
            redone = {(tally.read, tally.write): tally for tally in again}
            tallies = [redone.get((tally.read, tally.write), tally) for tally in tallies]
    by_name = {name: _result(tally, name, special, lm.dtype) for tally in tallies for name in tally.saes}
    return {name: by_name[name] for name in saes}


def _by_sites(lm: LM, saes: Mapping[str, SAE]) -> dict[tuple[Site, Site], dict[str, SAE]]:
    """The SAEs by where they read and write."""
    groups: dict[tuple[Site, Site], dict[str, SAE]] = {}
    for name, sae in saes.items():
        sae.require_decoder()
        if sae.read is None or sae.write is None:
            raise UnweaveError(
                "this SAE does not say which site it belongs to", where=name, remedy='name it: sae.at("resid_post.9")'
            )
        sae.verify(lm)
        groups.setdefault((lm.site(sae.read), lm.site(sae.write)), {})[name] = sae
    return groups


# -- one pass over the tokens -----------------------------------------------------------------------------------------


def _pass(lm: LM, tallies: Sequence[_Tally], batches: Sequence[Tokens], special: SpecialTokens) -> None:
    sites = {site for tally in tallies for site in (tally.read, tally.write)}
    first_row, total = 0, sum(batch.n_tokens for batch in batches)
    with task("special tokens", total=total, unit="tokens") as shown:
        for piece in batches:
            batch = piece.to(lm.device)
            seen = values_of(lm, sites, batch, max_tokens=batch.ids.numel())
            words = _Words.of(batch, special, first_row)
            for tally in tallies:
                tally.add(words, seen[tally.read], seen[tally.write])
            first_row += len(batch)
            shown.advance(batch.n_tokens)


@dataclass(frozen=True)
class _Words:
    """The n tokens of a batch that are not padding."""

    mask: Tensor  # bool [B, P], on the model's device
    ids: Tensor  # int64 [n], and all below: on the CPU
    rows: Tensor  # int64 [n], counted from the first row of all batches
    kinds: Tensor  # int64 [n], indices into KINDS
    first: Tensor  # bool [n]: the first token of its row

    @classmethod
    def of(cls, batch: Tokens, special: SpecialTokens, first_row: int) -> _Words:
        names = {role: role.name.lower() for role in Role} | {Role.SPECIAL: "template", Role.PAD: "template"}
        table = torch.tensor([KINDS.index(names[role]) for role in sorted(Role)])
        mask = batch.mask.cpu()
        kinds = torch.where(special.mask(batch).cpu(), _SPECIAL, table[batch.roles.cpu().long()])
        rows = first_row + torch.arange(len(mask))[:, None].expand_as(mask)
        first = mask & (mask.cumsum(1) == 1)
        return cls(batch.mask, batch.ids.cpu()[mask], rows[mask], kinds[mask], first[mask])


@dataclass
class _OfSAE:
    """Sums of one SAE, by cell (sequence and kind), and what was measured of each token that was held aside."""

    errors: Tensor  # float64 [R * K]
    l0: Tensor  # float64 [R * K]
    fired: Tensor  # int64 [F]
    untrained: int = 0
    untrained_special: int = 0
    held: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """errors and l0 [h] of every batch"""


class _Tally:
    """Sums for the SAEs that read one site and write one (mostly the same) site.

    A token is an outlier by its norm where the SAEs read and, for transcoders, also where they write: one or two
    norms per token. ``floors`` are the norms above which tokens are held aside; None: estimated as the pass goes on.
    """

    def __init__(
        self, read: Site, write: Site, saes: dict[str, SAE], n_rows: int, floors: tuple[float, ...] | None = None
    ) -> None:
        self.read, self.write, self.saes, self.n_rows, self.fixed = read, write, saes, n_rows, floors is not None
        self.two = read != write
        cells, width = n_rows * len(KINDS), next(iter(saes.values())).d_out
        zeros = torch.zeros(cells, dtype=torch.float64)
        self.of = {n: _OfSAE(zeros.clone(), zeros.clone(), torch.zeros(s.d_sae).long()) for n, s in saes.items()}
        self.counts = zeros
        self.first, self.second = torch.zeros(len(KINDS), width).double(), torch.zeros(len(KINDS)).double()
        self.shift = torch.zeros(0, dtype=torch.float64)
        self.tokens: list[tuple[Tensor, Tensor, Tensor]] = []
        """norms float32 [n, 1 or 2], kinds int8 [n], whether first of its row bool [n], of every batch"""
        self.held: list[tuple[Tensor, Tensor, Tensor]] = []
        """of the h tokens held aside: cells int64 [h], norms [h, 1 or 2], values float64 [h, D] less the shift"""
        self._floors = self._highest = floors or ()
        self._seen = self._known_at = 0

    def add(self, words: _Words, x: Tensor, y: Tensor) -> None:
        """Takes in one batch of activations x [B, P, d_in] and y [B, P, d_out]."""
        x, y = x[words.mask], y[words.mask]
        if not len(x):
            return
        for value, site in ((x, self.read), (y, self.write)):
            _require_finite(value, words.rows, f"activations at {site}")
        norms = torch.stack([value.float().norm(dim=-1) for value in ((x, y) if self.two else (x,))], 1).cpu()
        self.tokens.append((norms, words.kinds.to(torch.int8), words.first))
        self._seen += len(norms)
        held = (norms > torch.tensor(self._floor())).any(1)
        cells = words.rows * len(KINDS) + words.kinds
        self.held.append((cells[held], norms[held], self._moments(y, words.kinds, held)))
        self.counts.index_add_(0, cells[~held], torch.ones(int((~held).sum())).double())
        for name, sae in self.saes.items():
            self._measure(name, sae, words, x, y, cells, held)

    def _floor(self) -> tuple[float, ...]:
        """The norms above which tokens are held aside now: at most what the limits are expected to be."""
        if not self.fixed and self._seen >= 2 * self._known_at:  # medians of few tokens change, of many do not
            self._known_at = self._seen
            medians = _joined(self.tokens)[0].median(0).values.tolist()
            own = [sae.policy.max_norm for sae in self.saes.values()]
            lowest = min(_LONG_RATIO * medians[0] if limit is None else limit for limit in own)
            self._floors = (lowest, _LONG_RATIO * medians[1]) if self.two else (lowest,)
            self._highest = tuple(map(max, zip(self._floors, self._highest or self._floors, strict=True)))
        return self._floors

    def _moments(self, y: Tensor, kinds: Tensor, held: Tensor) -> Tensor:
        """Adds up the moments of y [n, D], and returns the values that are held aside."""
        values = y.double()
        if not len(self.shift):
            self.shift = values.mean(0).cpu()
        values = values - self.shift.to(values.device)
        by_kind = (F.one_hot(kinds, len(KINDS)).double() * ~held[:, None]).to(values.device)
        self.first += (by_kind.T @ values).cpu()
        self.second += (by_kind.T @ values.square().sum(-1)).cpu()
        return values[held.to(values.device)].cpu()

    def _measure(self, name: str, sae: SAE, words: _Words, x: Tensor, y: Tensor, cells: Tensor, held: Tensor) -> None:
        own, step = self.of[name], max(64, _PIECE_ELEMENTS // sae.d_sae)
        errors, fired = _joined([_compare(sae, own, a, b) for a, b in zip(x.split(step), y.split(step), strict=True)])
        _require_finite(errors[:, None], words.rows, f"reconstructions of {name} at {self.write}")
        own.errors.index_add_(0, cells[~held], errors[~held])
        own.l0.index_add_(0, cells[~held], fired[~held])
        own.held.append((errors[held], fired[held]))
        excluded = torch.isin(words.ids, torch.tensor(sae.policy.exclude_ids, dtype=torch.int64))
        own.untrained += int(excluded.sum())
        own.untrained_special += int((excluded & (words.kinds == _SPECIAL)).sum())

    # -- limits -----------------------------------------------------------------------------------------------------

    @cached_property
    def medians(self) -> list[float]:
        """Of the norms where the SAEs read and, for transcoders, where they write; after the pass."""
        return _joined(self.tokens)[0].median(0).values.tolist()

    def limits(self, sae: SAE) -> tuple[float, ...]:
        """The norms above which tokens are outliers for this SAE."""
        medians = self.medians
        own = OUTLIER_RATIO * medians[0] if sae.policy.max_norm is None else sae.policy.max_norm
        return (own, OUTLIER_RATIO * medians[1]) if self.two else (own,)

    def _lowest(self) -> tuple[float, ...]:
        return tuple(map(min, zip(*(self.limits(sae) for sae in self.saes.values()), strict=True)))

    @property
    def held_too_few(self) -> bool:
        """Whether some outlier may not have been held aside."""
        return any(limit < floor for limit, floor in zip(self._lowest(), self._highest, strict=True))

    def afresh(self) -> _Tally:
        """An empty one of the same SAEs that holds aside exactly what may be an outlier."""
        return _Tally(self.read, self.write, self.saes, self.n_rows, self._lowest())

    def sums(self, name: str, held: Tensor) -> Sums:
        """The sums of one SAE over the tokens not held aside and those of the held ones that ``held`` [h] names."""
        own, shape = self.of[name], (self.n_rows, len(KINDS))
        cells, values = (part[held] for part in _joined(self.held)[::2])
        errors, l0 = (part[held] for part in _joined(own.held))
        kinds = cells % len(KINDS)
        return Sums(
            counts=self.counts.index_add(0, cells, torch.ones(len(cells)).double()).view(shape),
            errors=own.errors.index_add(0, cells, errors).view(shape),
            l0=own.l0.index_add(0, cells, l0).view(shape),
            first=self.first.index_add(0, kinds, values),
            second=self.second.index_add(0, kinds, values.square().sum(-1)),
            shift=self.shift,
        )


def _joined(batches: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Each column of tensors as one."""
    return tuple(torch.cat(column) for column in zip(*batches, strict=True))


def _compare(sae: SAE, own: _OfSAE, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Squared errors [n] and numbers of latents above zero [n] of tokens x [n, d_in] against y [n, d_out], float64."""
    rows = x.to(sae.W_enc.dtype)
    codes = sae.codes(rows)
    # Gathering decoder rows pays only where few latents fire.
    xhat = sae.explained(codes.dense() if len(codes.values) * _DENSE_SHARE > len(x) * sae.d_sae else codes, rows)
    wide = torch.promote_types(xhat.dtype, torch.float32)
    fired = F.pad((codes.values > 0).cumsum(0), (1, 0))[codes.offsets].diff()
    own.fired += codes.counts().cpu()
    return (y.to(wide) - xhat.to(wide)).square().sum(-1, dtype=torch.float64).cpu(), fired.cpu().double()


def _require_finite(x: Tensor, rows: Tensor, what: str) -> None:
    """x [n, D] of tokens in ``rows`` [n] must be finite; names the first row where it is not."""
    bad = (~torch.isfinite(x).all(-1)).cpu()
    if bool(bad.any()):
        raise UnweaveError(
            f"{what} are not finite (NaN or infinity)",
            where=f"row {int(rows[bad][0])} of the tokens measured, in the order of the batches",
            remedy="use a wider dtype (float32), and check the weights and this row's tokens",
        )


# -- from sums to errors ----------------------------------------------------------------------------------------------


def _result(tally: _Tally, name: str, special: SpecialTokens, dtype: torch.dtype) -> MeasuredErrors:
    sae, own = tally.saes[name], tally.of[name]
    limits = tally.limits(sae)
    cells, long_norms, _ = _joined(tally.held)
    outliers = (long_norms > torch.tensor(limits)).any(1)
    both_norms, kinds, first = _joined(tally.tokens)
    norms = both_norms[:, 0]
    # Where tokens differ only by rounding, there is nothing to explain.
    flat = max(1e-10, (4 * torch.finfo(dtype).eps) ** 2)
    everything = tally.sums(name, torch.ones_like(outliers)).groups(flat)
    of_special = norms[kinds == _SPECIAL]
    return MeasuredErrors(
        metric_set=METRIC_SET,
        site=str(tally.write),
        site_read=str(tally.read),
        sequences=everything.all.sequences,
        special_ids=special.ids,
        special_where=special.where,
        everything=everything,
        without_outliers=tally.sums(name, ~outliers).groups(flat),
        sequences_without_special=everything.all.sequences - everything.special.sequences,
        median_norm=float(norms.median()),
        median_norm_write=tally.medians[1] if tally.two else None,
        median_norm_special=float(of_special.median()) if len(of_special) else None,
        median_norm_first=float(norms[first].median()),
        max_norm=limits[0],
        max_norm_write=limits[1] if tally.two else None,
        outliers=int(outliers.sum()),
        outliers_special=int((outliers & (cells % len(KINDS) == _SPECIAL)).sum()),
        untrained=own.untrained,
        untrained_special=own.untrained_special,
        alive_fraction=float((own.fired > 0).float().mean()),
        notes=_notes(own, everything),
        firing_counts=own.fired,
    )


def _notes(own: _OfSAE, everything: ByGroup) -> tuple[str, ...]:
    n = everything.special.tokens
    none = "no token is special: these rows are not conversations, or the ids are not this template's"
    excluded = (
        f"the SAE's policy excludes the ids of {own.untrained:,} of these tokens, {own.untrained_special:,} of the "
        f"{n:,} special ones among them: it was not trained on them, and is measured on them all the same"
    )
    return (*([none] if n == 0 else []), *([excluded] if own.untrained else []))
