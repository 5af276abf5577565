"""Where passes can begin: below the first block that is trained, edited or read, everything stays as it is.

The activations there are computed once for all tokens (a few kilobytes each), and every later pass begins with them
(``lm.taps(start=...)``): equal to the whole pass up to rounding, at the cost of the upper blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from unweave.core.progress import task
from unweave.core.site import Site
from unweave.lm.model import LM
from unweave.lm.taps import Start
from unweave.methods.finetune.rows import Rows
from unweave.sae.edits import Edit

_MOST_BYTES = 2 << 30
"""Activations of more bytes are not held: passes begin at the tokens."""
_BATCH = 32

_held: WeakKeyDictionary[LM, dict[tuple[object, ...], Starts]] = WeakKeyDictionary()
"""of the last calls for each model: runs that follow one another have the same rows, and often the same site"""


@dataclass(frozen=True)
class Starts:
    """The activations at ``site`` of the tokens of N rows, [T, D] one row after the other; ``first`` int64 [N + 1]."""

    site: Site
    values: Tensor
    first: Tensor

    def start(self, rows: Sequence[int], width: int) -> Start:
        """What a pass of these rows, padded on the left to ``width``, begins with: [B, width, D], 0 at padding."""
        value = self.values.new_zeros(len(rows), width, self.values.shape[1])
        for place, row in enumerate(rows):
            own = self.values[self.first[row] : self.first[row + 1]]
            value[place, width - len(own) :] = own
        return self.site, value


@dataclass(frozen=True)
class Passes:
    """How the rows of some splits go through the model."""

    begins: Site | None
    """where, below the first block that is trained; None: at the tokens"""
    starts: Mapping[str, Starts]
    """with what, by split; nothing where passes begin at the tokens"""
    edits: tuple[Edit, ...]
    """what is still to be edited in each pass"""


def passes(
    lm: LM,
    first_block: int,
    splits: Mapping[str, Rows],
    edits: Sequence[Edit] = (),
    reads: Iterable[Site] = (),
    *,
    constant: bool = True,
) -> Passes:
    """Passes that begin as high as blocks from ``first_block`` on, ``edits`` and ``reads`` allow. Edits that lie below
    and are ``constant`` are made once."""
    top = lowest(first_block, ())
    once = [one for one in edits if constant and top is not None and max([one.site, *one.needs]) <= top]
    each = [one for one in edits if one not in once]
    begins = lowest(first_block, [*reads, *_sites(each)])
    if begins != top:  # as for a transcoder that reads below the first trained block and writes above it
        once, each = [], list(edits)
        begins = lowest(first_block, [*reads, *_sites(each)])
    starts = starts_at(lm, begins, splits, once)
    return Passes(begins, starts, tuple(each)) if starts else Passes(None, {}, tuple(edits))


def _sites(edits: Iterable[Edit]) -> list[Site]:
    return [site for one in edits for site in (one.site, *one.needs)]


def lowest(first_block: int, sites: Iterable[Site]) -> Site | None:
    """The highest residual site with everything above it (or at it): blocks from ``first_block`` on, and ``sites``.

    None where that is the model's beginning, or one of the sites has no layer.
    """
    block = first_block
    for site in sites:
        if site.point in ("final_norm", "logits"):
            continue
        if site.layer is None:
            return None
        block = min(block, site.layer + (site.point == "resid_post"))
    return Site("resid_post", block - 1) if block > 0 else None


def starts_at(lm: LM, site: Site | None, splits: Mapping[str, Rows], edits: Sequence[Edit] = ()) -> dict[str, Starts]:
    """The activations of every split at ``site``, with ``edits`` in place; nothing where the site is None, or all would
    take too much memory."""
    tokens = sum(int(rows.lengths.sum()) for rows in splits.values())
    if site is None or tokens * lm.d_model * lm.dtype.itemsize > _MOST_BYTES:
        return {}
    about = (site, _versions(lm, site), *((repr(e), e.where, e.share, e.flow, e.sae.digest()) for e in edits))
    keys = {name: (*about, _content(rows)) for name, rows in splits.items()}
    held = _held.setdefault(lm, {})
    starts = {}
    for name, rows in splits.items():
        there = held.pop(keys[name], None)
        starts[name] = held[keys[name]] = there or _computed(lm, site, rows, name, edits)
    while sum(one.values.nbytes for one in held.values()) > _MOST_BYTES and len(held) > len(splits):
        held.pop(next(iter(held)))
    return starts


def _versions(lm: LM, site: Site) -> tuple[tuple[int, int], ...]:
    """Changes when somebody writes to a weight below the site."""
    assert site.layer is not None
    blocks = lm.layout.blocks[: site.layer + 1]
    parts = [lm.model.get_input_embeddings(), *blocks]
    return tuple((id(weight), weight._version) for part in parts for weight in part.parameters())


def _content(rows: Rows) -> str:
    """A digest of the rows' tokens."""
    content, order = hashlib.sha256(rows.lengths.numpy().tobytes()), range(len(rows.lengths))
    for i in range(0, len(order), _BATCH):
        tokens, _ = rows.batch(order[i : i + _BATCH])
        content.update(tokens.ids[tokens.mask].numpy().tobytes())
    return content.hexdigest()


def _computed(lm: LM, site: Site, rows: Rows, name: str, edits: Sequence[Edit]) -> Starts:
    lengths = rows.lengths
    first = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    values = torch.empty(int(first[-1]), lm.d_model, dtype=lm.dtype, device=lm.device)
    order = lengths.argsort(stable=True).tolist()
    with task(f"activations of {name} at {site}", total=len(order), unit="items") as shown:
        for batch in (order[i : i + _BATCH] for i in range(0, len(order), _BATCH)):
            tokens, _ = rows.batch(batch)
            with lm.taps(read=[site], edit=edits, stop=site) as seen:
                lm(tokens)
            for place, row in enumerate(batch):
                values[first[row] : first[row + 1]] = seen[site][place, tokens.mask[place].to(lm.device)]
            shown.advance(len(batch))
    return Starts(site, values, first)
