"""A classifier's view of a set of texts: the activation at one site, averaged over each text's tokens.

1. Texts are tokenised once and put into batches of similar length.
2. One pass up to the site gives the pooled activations of the model as it is, and keeps the residual stream where the
   lowest SAE's block begins. Everything that does not change the model shares them.
3. With edits the pass begins at that stream, unless something below it (the embedding) is edited, and ends at the
   site. The cost of an ablation is that of the blocks it can change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from unweave.attribute.states import beyond_first
from unweave.core.errors import UnweaveError
from unweave.core.progress import Task, task
from unweave.core.site import Site
from unweave.data.batches import by_length
from unweave.lm.chat import encode_text
from unweave.lm.model import LM, Tokens
from unweave.lm.taps import SiteEdit

Edit = SiteEdit


def pool(x: Tensor, tokens: Tokens, skip_first: int) -> Tensor:
    """Means [B, D] of activations x [B, P, D] over each row's tokens, without its first ``skip_first``.

    The first token of a text is an attention sink in many models: its activation is huge, and says nothing of the text.
    Sums are taken in float32 at least.
    """
    counted = beyond_first(tokens.mask, skip_first)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    weights = counted.to(wide.dtype).unsqueeze(-1)
    return (wide * weights).sum(1) / weights.sum(1)


class Pooled:
    """Texts and their pooled activations. ``clean`` [N, D] is computed once; ``edited`` once per call.

    ``begin`` is the block below which no edit but the embedding's lies. Raises UnweaveError for a text of no more than
    ``skip_first`` tokens.
    """

    def __init__(
        self,
        lm: LM,
        texts: Sequence[str],
        site: Site,
        *,
        begin: int | None = None,
        skip_first: int = 1,
        max_length: int = 128,
        batch_tokens: int = 2048,
    ) -> None:
        self.lm, self.site, self.skip_first, self.batch_tokens = lm, lm.site(site), skip_first, batch_tokens
        if lm.tokenizer is None:
            raise UnweaveError("texts need a tokenizer", where=lm.name, remedy="use a model that comes with one")
        encoded = [encode_text(lm.tokenizer, text) for text in texts]
        self.rows = [(ids[:max_length], roles[:max_length]) for ids, roles in encoded]
        for row, text in zip(self.rows, texts, strict=True):
            if len(row[0]) <= skip_first:
                what = f"no token is left to average over without the first {skip_first}"
                raise UnweaveError(what, where=repr(text[:60]), remedy="leave the text out, or skip fewer")
        self.begin = None if begin is None else Site("resid_pre", begin)
        self._streams: dict[int, Tensor] = {}
        self._clean: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, rows: Sequence[int], copies: int = 1) -> Iterator[list[int]]:
        """``rows`` sorted by length, in groups whose padded size times ``copies`` keeps to ``batch_tokens``."""
        order = sorted(rows)
        for group in by_length([len(self.rows[row][0]) for row in order], self.batch_tokens // copies):
            yield [order[i] for i in group]

    def tokens(self, rows: Sequence[int]) -> Tokens:
        """The tokens of some texts, padded on the right."""
        return Tokens.pad([self.rows[i] for i in rows], self.lm.pad_id)

    @property
    def clean(self) -> Tensor:
        """Pooled activations [N, D] of the model as it is, on the CPU."""
        if self._clean is None:
            with task("read texts", total=len(self), unit="texts") as shown:
                self._clean = self._read(range(len(self)), (), shown)
        return self._clean

    def edited(self, edits: Sequence[Edit], rows: Sequence[int] | None = None, name: str = "ablate") -> Tensor:
        """Pooled activations [n, D] of ``rows`` (all by default) with edits in place, on the CPU."""
        rows = range(len(self)) if rows is None else rows
        if not edits:
            return self.clean[list(rows)]
        with task(name, total=len(rows), unit="texts") as shown:
            return self._read(rows, edits, shown)

    def _read(self, rows: Sequence[int], edits: Sequence[Edit], shown: Task) -> Tensor:
        lm, place = self.lm, {row: i for i, row in enumerate(rows)}
        pooled = torch.zeros(0)
        above = bool(edits) and self._above(edits)
        for group in self.batches(rows):
            tokens = self.tokens(group).to(lm.device)
            start = (self.begin, self._stream(group, tokens)) if above and self.begin is not None else None
            keep = [self.begin] if self.begin is not None and not edits else []
            with lm.taps(read=[*keep, self.site], edit=list(edits), stop=self.site, start=start) as seen:
                lm(tokens)
            for site in keep:
                for i, row in enumerate(group):
                    self._streams[row] = seen[site][i, : len(self.rows[row][0])].clone()
            values = pool(seen[self.site], tokens, self.skip_first).cpu()
            pooled = pooled if len(pooled) else values.new_zeros(len(rows), values.shape[1])
            pooled[[place[row] for row in group]] = values
            shown.advance(len(group))
        return pooled

    def _above(self, edits: Sequence[Edit]) -> bool:
        """Whether no edit changes, or reads, anything below the block where a pass can begin."""
        if self.begin is None:
            return False
        touched = [site for edit in edits for site in (edit.site, *edit.needs)]
        return all(site.layer is not None and site >= self.begin for site in touched)

    def _stream(self, group: Sequence[int], tokens: Tokens) -> Tensor:
        """The kept residual stream [B, P, D] of some texts, zero at padding."""
        self.clean  # noqa: B018 (fills what is kept)
        first = self._streams[group[0]]
        stream = first.new_zeros(*tokens.ids.shape, first.shape[-1])
        for i, row in enumerate(group):
            stream[i, : len(self._streams[row])] = self._streams[row]
        return stream
