"""Documents as rows of token ids: each document a row, or all of them as one stream cut into blocks.

    documents   a row is one document, cut off at ``context`` tokens; shorter than ``min_tokens``: left out
    blocks      documents follow each other, cut into rows of exactly ``context`` tokens; what does not fill the last
                row is left out. EOS (BOS where there is no EOS) separates them, unless a document ends with a special
                token already, as most chat templates see to

Conversations go through the chat template either way and keep a role per token; a block may begin in mid-turn. BOS
stands only where a row begins, never inside one, unless it is the only separator there is (trap 4). Everything that is
left out is counted. A text far longer than a row is tokenised piece by piece, as rows are taken and no further.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, NamedTuple

from unweave.core.errors import UnweaveError
from unweave.core.rules import at_least, at_most
from unweave.core.spec import Spec
from unweave.data.corpus import Document
from unweave.data.splits import SplitDocuments
from unweave.lm.chat import Role, encode_text, encode_texts, has_template, render_each, special_ids
from unweave.lm.pieces import Piece, encode_pieces

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 2_000_000
_PIECE = 16_384, 32
"""characters, and characters a token of a row: a text longer than both is tokenised in pieces, the first that long"""
_PATIENCE = 1000
"""The text is refused when so many conversations at its start are unusable."""


@dataclass(frozen=True, kw_only=True)
class PackSpec(Spec):
    """How documents become rows of tokens."""

    packing: Literal["documents", "blocks"] = "documents"
    """One row a document, or one stream of all documents cut into blocks."""
    context: Annotated[int, at_least(2)] = 512
    """The most tokens of a row (blocks: exactly so many)."""
    min_tokens: Annotated[int, at_least(1), at_most("context")] = 8
    """Documents with fewer tokens are left out (not in blocks)."""
    bos: Literal["tokenizer", "always", "never"] = "tokenizer"
    """Whether rows begin with BOS: as the tokenizer (or the chat template) does by itself, always, or never."""
    unanswered: Literal["skip", "keep", "refuse"] = "skip"
    """Conversations without text from the assistant: left out and counted, kept, or an error."""


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
    truncated_documents: int = 0
    truncated_tokens: int = 0
    """tokens cut off"""
    unread_characters: int = 0
    """text cut off behind those, of documents so long that it was not tokenised"""
    short_documents: int = 0
    short_tokens: int = 0
    remainder_tokens: int = 0
    conversations: int = 0
    """that were rendered"""
    unanswered_conversations: int = 0
    """left out because they have no text from the assistant"""
    rejected_conversations: int = 0
    """left out because the chat template refuses or rewrites them"""
    first_rejected: str = ""
    """the first of them, and why"""
    empty_messages: int = 0
    """messages without text in conversations that were rendered; they stay"""


class _Encoded(NamedTuple):
    """A document as token ids and roles, in one or more pieces."""

    pieces: Iterable[Piece]
    length: int
    """where the last piece ends"""
    document: int


class Packed(Iterator[Row]):
    """The rows of ``pack``; ``counts`` grows as they are taken."""

    def __init__(self, docs: Iterable[Document], tokenizer: Any, spec: PackSpec) -> None:
        self.spec, self.counts = spec, PackCounts()
        self._docs, self._tokenizer = docs, tokenizer
        self._bos = _begins_with_bos(tokenizer, spec)
        make = self._documents if spec.packing == "documents" else self._blocks
        self._rows = make(self._encoded(docs), tokenizer)

    def __next__(self) -> Row:
        row = next(self._rows)
        self.counts.rows += 1
        self.counts.row_tokens += len(row.ids)
        return row

    def report(self) -> dict[str, dict[str, Any]]:
        """The counts as plain values: {"packing": ...} and those of the documents, where they count themselves."""
        of_documents = self._docs.report() if isinstance(self._docs, SplitDocuments) else {}
        return {"packing": asdict(self.counts)} | of_documents

    def in_words(self) -> str:
        """What became of the documents and conversations."""
        counts = self.counts
        words = [f"{counts.documents:,} documents read"]
        for count, reason in (
            (counts.short_documents, f"shorter than {self.spec.min_tokens} tokens"),
            (counts.truncated_tokens, "tokens cut off"),
            (counts.unread_characters, "characters behind them not tokenised"),
            (counts.unanswered_conversations, "conversations without an assistant turn"),
            (counts.rejected_conversations, "refused by the chat template"),
        ):
            words += [f"{count:,} {reason}"] if count else []
        before = [self._docs.in_words()] if isinstance(self._docs, SplitDocuments) else []
        return "; ".join([", ".join(words), *before])

    def require_conversations(self) -> None:
        """Raises UnweaveError when there were conversations and none of them could be used."""
        counts = self.counts
        if counts.conversations or not (counts.unanswered_conversations or counts.rejected_conversations):
            return
        if counts.rejected_conversations:
            raise UnweaveError(
                f"the chat template refuses all conversations, {counts.rejected_conversations:,} so far, besides "
                f"{counts.unanswered_conversations:,} without an assistant turn; the first: {counts.first_rejected}",
                remedy="use a model whose template takes such roles, or change the conversations",
            )
        what = f"none of the {counts.unanswered_conversations:,} conversations so far has an assistant turn"
        raise UnweaveError(what, remedy="set data.pack.unanswered to keep, or give conversations with answers")

    def _documents(self, encoded: Iterator[_Encoded], tokenizer: Any) -> Iterator[Row]:
        bos = tokenizer.bos_token_id
        for pieces, length, document in encoded:
            ids, roles, end = list[int](), list[int](), 0
            for piece in pieces:
                ids, roles, end = [*ids, *piece.ids], [*roles, *piece.roles], piece.end
                if len(ids) > self.spec.context + 1:  # whether BOS is put in front or taken off
                    break
            self.counts.unread_characters += length - end
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
            over = max(0, len(ids) - self.spec.context)
            self.counts.truncated_documents += over > 0
            self.counts.truncated_tokens += over
            yield Row(ids[: self.spec.context], roles[: self.spec.context], document)

    def _blocks(self, encoded: Iterator[_Encoded], tokenizer: Any) -> Iterator[Row]:
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        separator = eos if eos is not None else bos
        size = self.spec.context - (1 if self._bos else 0)
        head = ([bos], [Role.SPECIAL.value]) if self._bos else ([], [])
        marks = special_ids(tokenizer) - {tokenizer.unk_token_id}
        ids, roles, origin = list[int](), list[int](), list[int]()
        for part, document in self._parts(encoded, bos, separator, marks):
            ids += part.ids
            roles += part.roles
            origin += [document] * len(part.ids)
            at = 0
            while len(ids) - at >= size:
                self.counts.added_tokens += len(head[0])
                yield Row([*head[0], *ids[at : at + size]], [*head[1], *roles[at : at + size]], origin[at])
                at += size
            ids, roles, origin = ids[at:], roles[at:], origin[at:]
        self.counts.remainder_tokens += len(ids)

    def _parts(
        self, encoded: Iterator[_Encoded], bos: int | None, separator: int | None, marks: Set[int]
    ) -> Iterator[tuple[Piece, int]]:
        """What blocks are made of: each document in pieces, without an opening BOS and with its separator."""
        for pieces, length, document in encoded:
            last: list[int] = []
            for number, piece in enumerate(pieces):
                # A text in several pieces holds no BOS but the first token (see ``encode_pieces``).
                ids, roles, end = piece
                if number == 0 and _opens(ids, bos):
                    ids, roles = ids[1:], roles[1:]
                    self.counts.removed_bos += 1
                last = [*last, *ids][-2:]
                # A template's end of turn is a separator, be it followed by a line break (ChatML's is).
                if end == length and separator is not None and last and marks.isdisjoint(last):
                    ids, roles = [*ids, separator], [*roles, Role.SPECIAL.value]
                    self.counts.added_tokens += 1
                yield Piece(ids, roles, end), document

    def _encoded(self, docs: Iterable[Document]) -> Iterator[_Encoded]:
        """Ids and roles of each document that is used, tokenised in batches, long ones as their pieces are taken."""
        batch: list[Document] = []
        characters, first = 0, 0
        for document in docs:
            batch.append(document)
            characters += len(document.content)
            if len(batch) == _BATCH_DOCUMENTS or characters > _BATCH_CHARACTERS:
                yield from self._encode_batch(batch, first)
                first, batch, characters = first + len(batch), [], 0
        yield from self._encode_batch(batch, first)
        self.require_conversations()

    def _encode_batch(self, batch: list[Document], first: int) -> Iterator[_Encoded]:
        tokenizer, bos = self._tokenizer, self._tokenizer.bos_token_id
        conversations = [d for d in batch if d.messages is not None]
        if conversations and not has_template(tokenizer):
            what = "the text holds conversations, but this model's tokenizer has no chat template"
            remedy = "use an instruction-tuned model, or text that is not conversations (wiki, c4, sotu, .txt files)"
            raise UnweaveError(what, where=conversations[0].source, remedy=remedy)
        used = [d.messages or () for d in conversations if self.spec.unanswered == "keep" or _answered(d)]
        rendered = iter(render_each(tokenizer, used))
        size = max(_PIECE[0], _PIECE[1] * self.spec.context)
        plain = iter(encode_texts(tokenizer, [d.text for d in batch if d.text is not None and len(d.text) <= size]))
        for offset, document in enumerate(batch):
            self.counts.documents += 1
            if document.text is not None and len(document.text) > size:
                yield _Encoded(encode_pieces(tokenizer, document.text, size), len(document.text), first + offset)
                continue
            if document.messages is None:
                encoded = next(plain)
            elif self.spec.unanswered == "keep" or _answered(document):
                encoded = next(rendered)
            else:
                self._skip(document, None)
                continue
            if isinstance(encoded, UnweaveError):
                self._skip(document, encoded)
                continue
            if document.messages is not None:
                self.counts.conversations += 1
                self.counts.empty_messages += sum(not m["content"].strip() for m in document.messages)
            if bos is not None and encoded[0][:2] == [bos, bos]:
                what = "the chat template begins with two BOS tokens (trap: template and tokenizer both add one)"
                raise UnweaveError(what, where=_place(document), remedy="fix the tokenizer's chat template")
            yield _Encoded([Piece(*encoded, 0)], 0, first + offset)

    def _skip(self, document: Document, refusal: UnweaveError | None) -> None:
        """Counts a conversation that is left out, because it is refused or (None) because nobody answers in it."""
        counts = self.counts
        if refusal is not None:
            counts.rejected_conversations += 1
            counts.first_rejected = counts.first_rejected or f"{_place(document)}: {refusal.what}"
        elif self.spec.unanswered == "refuse":
            what = "this conversation has no text from the assistant"
            remedy = "drop it, or set data.pack.unanswered to skip or keep"
            raise UnweaveError(what, where=_place(document), remedy=remedy)
        else:
            counts.unanswered_conversations += 1
        if counts.rejected_conversations + counts.unanswered_conversations >= _PATIENCE:
            self.require_conversations()


def pack(docs: Iterable[Document], tokenizer: Any, spec: PackSpec) -> Packed:
    """Rows of the documents in their order, read as rows are taken; ``.counts`` says what was left out so far.

    Conversations that the chat template refuses, and by default those without an answer, are left out and counted; when
    none is left (at the end, or after the first thousand), that is an error. Raises UnweaveError, naming the document,
    for a doubled BOS, and at once when BOS is asked for and the tokenizer has none.
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


def _answered(document: Document) -> bool:
    """Whether the assistant says something in a conversation."""
    return any(m["role"] == "assistant" and m["content"].strip() for m in document.messages or ())


def _place(document: Document) -> str:
    return f"{document.source}, document {document.index}"
