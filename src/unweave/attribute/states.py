"""A site's value taken apart: x = decode(f) + e, with latents f and error e, on the clean and on the patched input.

A skip transcoder has x = decode(f) + r W_skip + e, with r what it reads. What the skip explains is not part of
the error, and it is not a node: it is a linear map from where it reads to where it writes. Patching or ablating nodes
leaves it alone, and it follows whatever changes below. Attribution, circuits and fine-tuning all begin here. Tokens
that an SAE's policy excludes (padding, special tokens, norm outliers) belong wholly to the error: f = 0 there, and the
skip has no part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.sae.module import SAE

SAEs = SAE | Sequence[SAE] | Mapping[Site, SAE]
"""One SAE, several that know their sites, or {site: SAE}."""


@dataclass(frozen=True)
class State:
    """A site's value taken apart: x [B, P, D] = decode(latents [B, P, F]) + error [B, P, D] (+ skip [B, P, D])."""

    x: Tensor
    latents: Tensor
    error: Tensor
    skip: Tensor | None = None

    @property
    def nodes(self) -> Tensor:
        """The part of x that latents and error make up, [B, P, D]."""
        return self.x if self.skip is None else self.x - self.skip


def states(lm: LM, saes: SAEs, tokens: Tokens, *, max_tokens: int = 1024) -> dict[Site, State]:
    """The state of every SAE's site on ``tokens``; at most ``max_tokens`` tokens in a forward pass."""
    by_site = by_site_of(lm, saes)
    tokens = tokens.to(lm.device)
    sites = {*by_site, *(reads_of(sae, site) for site, sae in by_site.items())}
    return take_apart(by_site, values_of(lm, sites, tokens, max_tokens=max_tokens), tokens)


def values_of(lm: LM, sites: Iterable[Site], tokens: Tokens, *, max_tokens: int = 1024) -> dict[Site, Tensor]:
    """The values [B, P, D] of sites on ``tokens``; at most ``max_tokens`` tokens in a forward pass."""
    ordered = sorted(sites)
    # Where a module path lies is not known from its name, so such sites need the whole forward pass.
    stop = None if any(site.point == "path" for site in ordered) else ordered[-1]
    keep = 0 if Site("logits") in ordered else 1
    parts = []
    for rows in chunks(len(tokens), tokens.ids.shape[1], max_tokens):
        with lm.taps(read=ordered, stop=stop) as seen:
            lm(tokens.rows(rows), keep_logits=keep)
        parts.append({site: seen[site] for site in ordered})
    return {site: torch.cat([part[site] for part in parts]) for site in ordered}


def site_of(sae: SAE) -> Site:
    """The site an SAE writes to. Raises UnweaveError when its file named none."""
    if sae.write is None:
        raise UnweaveError("this SAE's file named no site", remedy='name it: sae.at("resid_post.9")')
    return sae.write


def reads_of(sae: SAE, write: Site) -> Site:
    """The site a transcoder encodes; an SAE's own site otherwise, whatever name the caller gave it."""
    return write if sae.read is None or sae.read == sae.write else sae.read


def by_site_of(lm: LM, saes: SAEs) -> dict[Site, SAE]:
    """SAEs by the site they write to, in execution order, each verified against the model."""
    if isinstance(saes, Mapping):
        named = [(lm.site(site), sae) for site, sae in saes.items()]
    else:
        named = [(lm.site(site_of(sae)), sae) for sae in ([saes] if isinstance(saes, SAE) else saes)]
    if not named:
        raise UnweaveError("there are no SAEs", remedy="give at least one")
    for site, sae in named:
        if sae.write is not None and sae.write != site:
            raise UnweaveError(f"this SAE writes to {sae.write}, not to {site}", remedy="use the SAE of that site")
        sae.verify(lm)
    if len({site for site, _ in named}) != len(named):
        raise UnweaveError("two SAEs have the same site", remedy="give one SAE per site")
    return dict(sorted(named, key=lambda item: item[0]))


def counted(lm: LM, sae: SAE, source: Tensor, tokens: Tokens) -> Tensor:
    """Which tokens count for means over texts, bool [B, P]: those that the SAE's policy keeps, but for the one that
    begins a text, whose activations are outliers. ``source`` [B, P, D] is what the SAE reads."""
    keep = sae.policy.keep(source, tokens.ids, tokens.mask)
    bos = None if lm.tokenizer is None else lm.tokenizer.bos_token_id
    return keep if bos is None else keep & (tokens.ids != bos)


def _state(sae: SAE, source: Tensor, x: Tensor, ids: Tensor, mask: Tensor) -> State:
    with torch.no_grad():
        keep = sae.policy.keep(source, ids, mask).unsqueeze(-1)
        latents, skip = sae.encode(source) * keep, sae.through_skip(source, keep)
        return State(x, latents, (x if skip is None else x - skip) - sae.decode(latents), skip)


def take_apart(by_site: Mapping[Site, SAE], values: Mapping[Site, Tensor], tokens: Tokens) -> dict[Site, State]:
    """The state of every SAE's site, from the values [B, P, D] of all sites that are read or written."""
    return {
        site: _state(sae, values[reads_of(sae, site)], values[site].to(sae.W_dec.dtype), tokens.ids, tokens.mask)
        for site, sae in by_site.items()
    }


def change_of(sae: SAE, start: State, patch: State | None, moved: Tensor) -> State:
    """How latents and error change from clean to patch, and x by them, where positions are moved; 0 elsewhere."""
    at = moved.unsqueeze(-1)
    if patch is None:
        return State((sae.b_dec - start.nodes) * at, -start.latents * at, -start.error * at)
    moves = patch.nodes - start.nodes, patch.latents - start.latents, patch.error - start.error
    return State(*(move * at for move in moves))


Patch = Tokens | Mapping[Site, State] | None
"""What nodes go to: their values on other tokens, fixed ones by site (latents [1, F], error and x [1, D]), or zero."""


def line_up(lm: LM, clean: Tokens, patch: Patch) -> tuple[Tokens, Tokens | None, Mapping[Site, State]]:
    """Both inputs on the model's device, or the values in place of the second.

    Raises UnweaveError when their lengths or padding differ.
    """
    if not isinstance(patch, Tokens):
        return clean.to(lm.device), None, patch or {}
    if clean.ids.shape != patch.ids.shape or not torch.equal(clean.mask, patch.mask):
        what = f"clean inputs {list(clean.ids.shape)} and patch inputs {list(patch.ids.shape)} do not line up"
        raise UnweaveError(what, remedy="pair texts with equally many tokens, padded alike")
    return clean.to(lm.device), patch.to(lm.device), {}


def moved_positions(tokens: Tokens, positions: Tensor | None) -> Tensor:
    """Where patching may change something, bool [B, P]: the chosen positions (None: all) that are not padding."""
    if positions is None:
        return tokens.mask
    if positions.shape != tokens.mask.shape or positions.dtype != torch.bool:
        what = f"positions is {positions.dtype} {list(positions.shape)}, not bool {list(tokens.mask.shape)}"
        raise UnweaveError(what, remedy="give one truth value per token")
    return positions.to(tokens.mask.device) & tokens.mask


def beyond_first(mask: Tensor, skip_first: int) -> Tensor:
    """The tokens that are neither padding nor among each row's first ``skip_first``, bool [B, P].

    Raises UnweaveError for a row that has no others.
    """
    free = mask & (mask.cumsum(1) > skip_first)
    if not bool(free.any(1).all()):
        raise UnweaveError(
            f"a text has no tokens beside the first {skip_first}", where="skip_first", remedy="leave fewer alone"
        )
    return free


def chunks(n_rows: int, width: int, max_tokens: int) -> Iterator[slice]:
    """Slices of rows of ``width`` tokens, each with at most ``max_tokens`` tokens (but at least one row)."""
    step = max(1, max_tokens // width)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))
