"""Forward passes with other values at one site: they begin where something changes, and never hold logits whole.

1. Below the SAE nothing changes. So a pass with other values begins at the residual stream below where the SAE writes
   (``lm.taps(start=...)``), and the clean pass goes on from where an earlier one stopped.
2. Rows that begin alike end alike, and are run once: ablation often leaves nothing that differs (``Row``).
3. A pass ends at the final norm. Logits are computed for some tokens and one tile of the vocabulary at a time, of all
   passes at once. With running maxima their log-sum-exp and divergence are summed up over the tiles, in float64:

       CE = lse(z) - z[target]          KL(p || q) = sum_v p_v (z_v - w_v) - (lse(z) - lse(w))

Where the order of sites is not known (module paths) or taps of somebody else are open, passes begin at the tokens;
where logits are made or changed in another way than ``unembed`` makes them, they come whole from the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.lm.unembed import knows, unembed

if TYPE_CHECKING:
    from unweave.lm.taps import EditFn, Start

_TILES = {"cpu": (256, 512)}
"""Tokens and ids whose logits are computed at a time: on a processor, few enough to stay in its cache."""
_LARGE_TILE = (2048, 4096)
_NOT_UNEMBEDDED = ("logits", "path")


@dataclass(frozen=True)
class Passes:
    """How the passes of an SAE run that reads ``read`` and writes ``write``."""

    lm: LM
    read: Site
    write: Site
    low: Site | None
    """The residual stream below both, where a clean pass can begin; None: it begins at the tokens."""
    stream: Site | None
    """The residual stream at or below ``write``, where passes with other values there begin; None likewise."""
    end: Site | None
    """Where passes end, before the unembedding; None: at the model's own logits."""

    @classmethod
    def of(cls, lm: LM, read: Site, write: Site) -> Passes:
        others = {site for session in lm.sessions for site in session.taken}
        whole = any(site.point in _NOT_UNEMBEDDED for site in (read, write, *others)) or not knows(lm)
        known = not lm.sessions and write.point != "path"
        stream = _stream_below(lm, write) if known else None
        low = _stream_below(lm, min(read, write)) if known and read.point != "path" else None
        return cls(lm, read, write, low, stream, None if whole else Site("final_norm"))

    def first(self, batch: Tokens) -> Mapping[Site, Tensor]:
        """The values at ``read``, ``write`` and ``low``, from a pass that ends at the last of them."""
        in_order = "path" not in (self.read.point, self.write.point)
        stop = self.read if self.read == self.write else max(self.read, self.write) if in_order else None
        with self.lm.taps(read=self._read(self.low), stop=stop) as seen:
            self.lm(batch)
        return seen

    def clean(self, batch: Tokens, low: Tensor | None) -> tuple[Mapping[Site, Tensor], Tensor]:
        """The values at ``read``, ``write`` and ``stream``, and the end [B, P, D or V].

        Where ``low`` [B, P, D] is given, the pass begins with it.
        """
        begin = None if low is None or self.low is None else (self.low, low)
        with self.lm.taps(read=self._read(self.stream, self.end), stop=self.end, start=begin) as seen:
            logits = self.lm(batch)
        return seen, self._ended(seen, logits)

    def edited(self, batch: Tokens, value: Tensor, stream: Tensor | None, known: list[Row]) -> Tensor:
        """The end [B, P, D or V] of a pass with ``value`` [B, P, d_out] where the SAE writes; ``stream`` [B, P, D] is
        what the clean pass has at ``stream``. ``known`` holds rows of earlier batches, and then those of this one."""
        if self.stream is None or stream is None:
            return self._run(batch, {self.write: lambda x, at: value}, None)
        if self.stream != self.write:
            return self._run(batch, {self.write: lambda x, at: value}, (self.stream, stream))
        rows: list[Row] = []
        for x, mask in zip(value, batch.mask, strict=True):
            alike = (row for row in (*known, *rows) if row.is_like(x, mask, whole_mask=bool(self.lm.rotaries)))
            rows.append(next(alike, None) or Row(x, mask))
        places = [place for place, row in enumerate(rows) if row.end is None and row not in rows[:place]]
        if places:
            new = Tokens(batch.ids[places], batch.mask[places], batch.roles[places])
            for place, end in zip(places, self._run(new, {}, (self.write, value[places])), strict=True):
                rows[place].end = end
        known[:] = dict.fromkeys(rows)
        return torch.stack([row.end for row in rows if row.end is not None])

    def _run(self, batch: Tokens, edits: Mapping[Site, EditFn], begin: Start | None) -> Tensor:
        with self.lm.taps(read=[self.end] if self.end else [], edit=edits, stop=self.end, start=begin) as seen:
            logits = self.lm(batch)
        return self._ended(seen, logits)

    def _read(self, *more: Site | None) -> list[Site]:
        return [self.read, self.write, *(site for site in more if site is not None)]

    def _ended(self, seen: Mapping[Site, Tensor], logits: Tensor | None) -> Tensor:
        if self.end is not None:
            return seen[self.end]
        assert logits is not None
        return logits

    def losses(self, ends: Sequence[Tensor], batch: Tokens) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Of each next token that is real: its row and position before it (int64 [n] each), and of every pass that
        ended with ``ends`` the cross-entropy and KL(first || it), both float64 [passes, n], in nats."""
        rows, positions = (batch.mask[:, :-1] & batch.mask[:, 1:]).nonzero(as_tuple=True)
        targets = batch.ids[rows, positions + 1]
        n_tokens, n_ids = _TILES.get(rows.device.type, _LARGE_TILE)
        losses = []
        for r, p, target in zip(*(each.split(n_tokens) for each in (rows, positions, targets)), strict=True):
            tally, states = _Tally(len(ends), target), [end[r, p] for end in ends]
            for first in range(0, self.lm.vocab_size, n_ids):
                ids = slice(first, first + n_ids)
                tally.add([x[:, ids] if self.end is None else unembed(self.lm, x, ids) for x in states], first)
            losses.append(tally.losses())
        ce, kl = (torch.cat(values, 1) for values in zip(*losses, strict=True))
        return (rows, positions), ce, kl


@dataclass(eq=False)
class Row:
    """A row of tokens: the stream that its pass begins with, [P, D], and once it has run the end, [P, D or V].

    Ablation makes tokens equal, often all but a first one that is the same in every row; the rest of the pass is then
    the same too, whatever the tokens were.
    """

    value: Tensor
    mask: Tensor
    end: Tensor | None = None

    def is_like(self, value: Tensor, mask: Tensor, *, whole_mask: bool) -> bool:
        """Whether a row that begins with ``value`` and holds tokens where ``mask`` ends as this one.

        Padding on the right changes nothing for the tokens before it, but where positions depend on a row's length
        (``whole_mask``).
        """
        if value.shape != self.value.shape or not torch.equal(value, self.value):
            return False
        return torch.equal(mask, self.mask) or (not whole_mask and bool(mask[0]) and bool(self.mask[0]))


class _Tally:
    """Sums over tiles of the vocabulary for n tokens, from which their cross-entropies and divergences follow."""

    def __init__(self, n_passes: int, targets: Tensor) -> None:
        n, device = len(targets), targets.device
        self.targets = targets
        self.top = torch.full((n_passes, n), -torch.inf, dtype=torch.float64, device=device)
        self.total = torch.zeros_like(self.top)  # of exp(z - top)
        self.cross = torch.zeros_like(self.top)  # of exp(z - top) (z - w), z the first
        self.chosen = torch.zeros_like(self.top)  # the target's logit

    def add(self, logits: Sequence[Tensor], first: int) -> None:
        """Takes in the logits [n, v] of every pass for the ids from ``first`` on."""
        at = self.targets - first
        here = (at >= 0) & (at < logits[0].shape[1])
        at = at.clamp(0, logits[0].shape[1] - 1)[:, None]
        clean = weights = logits[0].to(torch.promote_types(logits[0].dtype, torch.float32))
        for k, tile in enumerate(logits):
            z = tile.to(clean.dtype)
            top = torch.maximum(self.top[k], z.amax(1).double())
            shrunk = (self.top[k] - top).exp()
            e = (z - top[:, None].to(z.dtype)).exp_()
            self.total[k] = self.total[k] * shrunk + e.sum(1)
            self.top[k] = top
            if k == 0:
                weights, shrunk_clean = e, shrunk
            else:
                self.cross[k] = self.cross[k] * shrunk_clean + (clean - z).mul_(weights).sum(1)
            self.chosen[k] = torch.where(here, z.gather(1, at).squeeze(1).double(), self.chosen[k])

    def losses(self) -> tuple[Tensor, Tensor]:
        """Cross-entropy and divergence from the first, float64 [passes, n] each."""
        whole = self.top + self.total.log()
        return whole - self.chosen, self.cross / self.total[0] - (whole[0] - whole)


def _stream_below(lm: LM, site: Site) -> Site:
    """The residual stream (or embedding) at ``site`` or the last one below it."""
    if site.point in ("embed", "resid_pre", "resid_post"):
        return site
    return Site("resid_post", lm.n_layers - 1) if site.layer is None else Site("resid_pre", site.layer)
