"""Documents as rows of token ids: each document a row, or all of them as one stream cut into blocks.

    documents   a row is one document, cut off at ``context`` tokens; shorter than ``min_tokens``: left out
    blocks      documents follow each other, separated by EOS (BOS where there is no EOS), cut into rows of exactly
                ``context`` tokens; what does not fill the last row is left out

BOS stands only where a row begins, never inside one, unless it is the only separator there is (trap 4). Everything that
is left out is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Self

from unweave.core.errors import UnweaveError
from unweave.core.spec import Spec
from unweave.data.corpus import Document
from unweave.lm.chat import Role, encode_text, encode_texts, has_template, render, render_many

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 2_000_000


@dataclass(frozen=True, kw_only=True)
class PackSpec(Spec):
    """How documents become rows of tokens."""

    packing: Literal["documents", "blocks"] = "documents"
    """One row a document, or one stream of all documents cut into blocks."""
    context: int = 512
    """The most tokens of a row (blocks: exactly so many)."""
    min_tokens: int = 8
    """Documents with fewer tokens are left out (not in blocks)."""
    bos: Literal["tokenizer", "always", "never"] = "tokenizer"
    """Whether rows begin with BOS: as the tokenizer (or the chat template) does by itself, always, or never."""

    def __post_init__(self) -> None:
        if self.context < 2 or self.min_tokens < 1 or self.min_tokens > self.context:
            raise UnweaveError(
                f"rows of {self.min_tokens} to {self.context} tokens cannot be made",
                remedy="give a context of at least 2 and min_tokens from 1 to the context",
            )


class Row(NamedTuple):
    """Token ids, their roles, and which document of the stream they (or the first of them) come from."""

    ids: list[int]
    roles: list[int]
    document: int


@dataclass
class PackCounts:
    """What became of the tokens so far: given out in rows, or left out and why."""

    documents: int = 0
    rows: int = 0
    row_tokens: int = 0
    added_tokens: int = 0
    """separators, and BOS put in front of rows"""
    removed_bos: int = 0
    truncated_tokens: int = 0
    short_documents: int = 0
    short_tokens: int = 0
    remainder_tokens: int = 0


class Packed(Iterator[Row]):
    """The rows of ``pack``; ``counts`` grows as they are taken."""

    def __init__(self, docs: Iterable[Document], tokenizer: Any, spec: PackSpec) -> None:
        self.spec, self.counts = spec, PackCounts()
        self._bos = _begins_with_bos(tokenizer, spec)
        encoded = self._counted(_encoded(docs, tokenizer))
        make = self._documents if spec.packing == "documents" else self._blocks
        self._rows = make(encoded, tokenizer)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Row:
        row = next(self._rows)
        self.counts.rows += 1
        self.counts.row_tokens += len(row.ids)
        return row

    def report(self) -> dict[str, int]:
        """The counts as plain values."""
        return asdict(self.counts)

    def _counted(self, encoded: Iterator[Row]) -> Iterator[Row]:
        for row in encoded:
            self.counts.documents += 1
            yield row

    def _documents(self, encoded: Iterator[Row], tokenizer: Any) -> Iterator[Row]:
        bos = tokenizer.bos_token_id
        for ids, roles, document in encoded:
            if self.spec.bos == "always" and ids[:1] != [bos]:
                ids, roles = [bos, *ids], [Role.SPECIAL.value, *roles]
                self.counts.added_tokens += 1
            elif self.spec.bos == "never" and _opens(ids, bos):
                ids, roles = ids[1:], roles[1:]
                self.counts.removed_bos += 1
            if len(ids) < self.spec.min_tokens:
                self.counts.short_documents += 1
                self.counts.short_tokens += len(ids)
                continue
            self.counts.truncated_tokens += max(0, len(ids) - self.spec.context)
            yield Row(ids[: self.spec.context], roles[: self.spec.context], document)

    def _blocks(self, encoded: Iterator[Row], tokenizer: Any) -> Iterator[Row]:
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        separator = eos if eos is not None else bos
        size = self.spec.context - (1 if self._bos else 0)
        head = ([bos], [Role.SPECIAL.value]) if self._bos else ([], [])
        ids: list[int] = []
        roles: list[int] = []
        origin: list[int] = []
        for new_ids, new_roles, document in encoded:
            if _opens(new_ids, bos):
                new_ids, new_roles = new_ids[1:], new_roles[1:]
                self.counts.removed_bos += 1
            if separator is not None and new_ids and new_ids[-1] != separator:
                new_ids, new_roles = [*new_ids, separator], [*new_roles, Role.SPECIAL.value]
                self.counts.added_tokens += 1
            ids += new_ids
            roles += new_roles
            origin += [document] * len(new_ids)
            at = 0
            while len(ids) - at >= size:
                self.counts.added_tokens += len(head[0])
                yield Row([*head[0], *ids[at : at + size]], [*head[1], *roles[at : at + size]], origin[at])
                at += size
            ids, roles, origin = ids[at:], roles[at:], origin[at:]
        self.counts.remainder_tokens += len(ids)


def pack(docs: Iterable[Document], tokenizer: Any, spec: PackSpec) -> Packed:
    """Rows of the documents in their order, read as rows are taken; ``.counts`` says what was left out so far.

    Raises UnweaveError, naming the document, for conversations that the tokenizer cannot render and for a doubled BOS,
    and at once when BOS is asked for and the tokenizer has none.
    """
    return Packed(docs, tokenizer, spec)


def _opens(ids: list[int], bos: int | None) -> bool:
    """Whether a document begins with BOS as a mark of its start.

    ChatML models use one token as BOS and to open every turn; the first turn of a conversation must keep it.
    """
    return bos is not None and ids[:1] == [bos] and bos not in ids[1:]


def _begins_with_bos(tokenizer: Any, spec: PackSpec) -> bool:
    """Whether blocks begin with BOS under the policy."""
    bos = tokenizer.bos_token_id
    if bos is None and spec.bos == "always":
        raise UnweaveError("rows should begin with BOS, but the tokenizer has none", remedy="set bos to tokenizer")
    if spec.bos == "tokenizer":
        return bos is not None and encode_text(tokenizer, "a")[0][:1] == [bos]
    return spec.bos == "always"


def _encoded(docs: Iterable[Document], tokenizer: Any) -> Iterator[Row]:
    """Ids and roles of each document, tokenised in batches."""
    batch: list[Document] = []
    characters, first = 0, 0
    for document in docs:
        batch.append(document)
        characters += len(document.content)
        if len(batch) == _BATCH_DOCUMENTS or characters > _BATCH_CHARACTERS:
            yield from _encode_batch(batch, first, tokenizer)
            first, batch, characters = first + len(batch), [], 0
    yield from _encode_batch(batch, first, tokenizer)


def _encode_batch(batch: list[Document], first: int, tokenizer: Any) -> Iterator[Row]:
    chats = [d.messages for d in batch if d.messages is not None]
    texts = [d.text for d in batch if d.text is not None]
    if chats and not has_template(tokenizer):
        raise UnweaveError(
            "the text holds conversations, but this model's tokenizer has no chat template",
            where=next(d.source for d in batch if d.messages is not None),
            remedy="use an instruction-tuned model, or text that is not conversations (wiki, c4, sotu, .txt files)",
        )
    try:
        rendered = iter(render_many(tokenizer, chats))
    except UnweaveError:
        rendered = (_render_one(tokenizer, d) for d in batch if d.messages is not None)  # finds and names the culprit
    plain = iter(encode_texts(tokenizer, texts))
    bos = tokenizer.bos_token_id
    for offset, document in enumerate(batch):
        ids, roles = next(plain if document.messages is None else rendered)
        if bos is not None and ids[:2] == [bos, bos]:
            raise UnweaveError(
                "the chat template begins with two BOS tokens (trap: template and tokenizer both add one)",
                where=f"{document.source}, document {document.index}",
                remedy="mend the tokenizer's chat template",
            )
        yield Row(ids, roles, first + offset)


def _render_one(tokenizer: Any, document: Document) -> tuple[list[int], list[int]]:
    try:
        return render(tokenizer, document.messages or ())
    except UnweaveError as error:
        where = f"{document.source}, document {document.index}"
        raise UnweaveError(error.what, where=where, remedy=error.remedy) from error
