"""Tokenised text on disk: one memory map of ids, one of roles, and where each row begins.

    ids.bin     uint32 [T]     roles.bin   uint8 [T]     starts.npy  int64 [R + 1]     documents.npy  int64 [R]
    meta.json   counts, checksums, and what the writer recorded of tokenizer and text

A store is written beside its place and renamed, so one that is there is whole. Padding is never stored.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from unweave.core.contents import sha256
from unweave.core.errors import UnweaveError
from unweave.core.memory import refuse_if_memory
from unweave.core.progress import task
from unweave.core.writing import friendly_io, sync_folder
from unweave.data.pack import Packed, Row
from unweave.lm.chat import Role
from unweave.lm.model import Tokens

_FILES = ("ids.bin", "roles.bin", "starts.npy", "documents.npy")
Unit = Literal["tokens", "documents"]
_CHECKED_BYTES = 1 << 30
"""Files up to this size are compared with their checksum on opening (about a second a gigabyte); others by size."""


class TokenStore:
    """R rows with T tokens in all.

    ids uint32 [T] and roles uint8 [T] are memory maps; starts int64 [R+1] says where rows begin; documents int64 [R]
    which document of the written stream a row comes from; meta is what was written plus the counts.
    """

    def __init__(self, folder: Path, meta: dict[str, Any], starts: np.ndarray, documents: np.ndarray) -> None:
        self.folder, self.meta, self.starts, self.documents = folder, meta, starts, documents
        n = int(starts[-1])
        self.ids: np.ndarray = np.memmap(folder / "ids.bin", dtype=np.uint32, mode="r", shape=(n,))
        self.roles: np.ndarray = np.memmap(folder / "roles.bin", dtype=np.uint8, mode="r", shape=(n,))

    @property
    def n_rows(self) -> int:
        return len(self.starts) - 1

    @property
    def n_tokens(self) -> int:
        return int(self.starts[-1])

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits of everything stored: ids, roles, rows."""
        joined = "".join(self.meta["sha256"][name] for name in _FILES)
        return hashlib.sha256(joined.encode()).hexdigest()[:12]

    @classmethod
    def write(
        cls, folder: Path, rows: Iterable[Row], budget: int | None, meta: Mapping[str, Any], *, unit: Unit = "tokens"
    ) -> TokenStore:
        """Stores rows until they hold ``budget`` tokens, or documents (None: all); what reaches it is kept whole.

        ``meta`` is kept beside the counts: rows, tokens, documents, tokens by role and, for rows of ``pack``, what
        became of the rest under "packing", "text" and "dedup" (see ``Packed.report``). Raises
        UnweaveError when there are no rows, when they hold less than asked (trap 10), when padding is among
        them (trap 2), and when the folder cannot be written.
        """
        folder = Path(folder)
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        with friendly_io(folder):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            try:
                counts = _write_rows(temporary, rows, budget, unit)
                if isinstance(rows, Packed):
                    rows.require_conversations()
                    counts |= rows.report()
                sizes = {name: (temporary / name).stat().st_size for name in _FILES}
                sums = {name: sha256(temporary / name) for name in _FILES}
                full = {**meta, "format": 1, "counts": counts, "bytes": sizes, "sha256": sums}
                (temporary / "meta.json").write_text(json.dumps(full, indent=1, ensure_ascii=False), encoding="utf-8")
                for name in (*_FILES, "meta.json"):
                    with open(temporary / name, "rb") as handle:
                        os.fsync(handle.fileno())
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(temporary, folder)
                sync_folder(folder.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """Opens what ``write`` made. UnweaveError when files are missing, cut short or do not fit together."""
        folder = Path(folder)

        def refuse(what: str) -> NoReturn:
            raise UnweaveError(what, where=str(folder), remedy="delete the folder and tokenise the text again")

        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            expected, sums = meta["bytes"], meta["sha256"]
            for name in _FILES:
                size = (folder / name).stat().st_size
                if size != expected[name]:
                    refuse(f"stored tokens are damaged: {name} has {size} bytes instead of {expected[name]}")
                if size <= _CHECKED_BYTES and sha256(folder / name) != sums[name]:
                    refuse(f"stored tokens are damaged: {name} is not what was written")
            starts = np.load(folder / "starts.npy", allow_pickle=False)
            documents = np.load(folder / "documents.npy", allow_pickle=False)
        except FileNotFoundError as error:
            refuse(f"this folder does not hold stored tokens: {Path(error.filename).name} is missing")
        except (ValueError, KeyError, TypeError, OSError) as error:
            refuse_if_memory(error, folder)
            refuse(f"stored tokens cannot be read: {error}")
        rows_fit = len(documents) == len(starts) - 1 >= 1 and starts[0] == 0 and bool((np.diff(starts) > 0).all())
        if not rows_fit or expected["ids.bin"] != 4 * starts[-1] or expected["roles.bin"] != starts[-1]:
            refuse("stored tokens are damaged: rows and tokens do not fit together")
        return cls(folder, meta, starts, documents)

    def require_tokenizer(self, fingerprint: str | None) -> None:
        """Refuses tokens of another tokenizer (trap 10); ``write``'s meta holds the fingerprint as "tokenizer"."""
        made_by = self.meta.get("tokenizer")
        if made_by != fingerprint:
            what = f"these tokens were made by another tokenizer ({made_by}, the model's is {fingerprint})"
            raise UnweaveError(what, where=str(self.folder), remedy="tokenise the text again with this model")

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and roles of one row, int64 and uint8 arrays of its length."""
        span = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return self.ids[span].astype(np.int64), np.array(self.roles[span])

    def batch(
        self, row_indices: Sequence[int], pad_id: int, side: Literal["left", "right"] = "right"
    ) -> tuple[Tokens, Tensor]:
        """Some rows padded to the longest, and the place of every token in the store: int64 [B, P], -1 at padding."""
        index = np.asarray(row_indices, dtype=np.int64)
        if index.size == 0:
            raise UnweaveError("a batch has no rows", remedy="name at least one row")
        first = self.starts[index]
        lengths = self.starts[index + 1] - first
        column = np.arange(int(lengths.max()))[None, :]
        if side == "left":
            column = column - (lengths.max() - lengths)[:, None]
        inside = (column >= 0) & (column < lengths[:, None])
        where = np.where(inside, first[:, None] + column, -1)
        ids = np.full(where.shape, pad_id, dtype=np.int64)
        roles = np.full(where.shape, Role.PAD.value, dtype=np.uint8)
        ids[inside] = self.ids[where[inside]]
        roles[inside] = self.roles[where[inside]]
        tokens = Tokens(torch.from_numpy(ids), torch.from_numpy(inside), torch.from_numpy(roles))
        return tokens, torch.from_numpy(where)


def _write_rows(folder: Path, rows: Iterable[Row], budget: int | None, unit: Unit) -> dict[str, Any]:
    """Writes the four files; returns how many rows and tokens, in all and by role."""
    starts, documents = [0], []
    by_role = np.zeros(len(Role), dtype=np.int64)
    with (
        task("tokenise", total=budget or 0, unit=unit) as shown,
        open(folder / "ids.bin", "wb") as ids_file,
        open(folder / "roles.bin", "wb") as roles_file,
    ):
        for row in _until(rows, budget, unit):
            roles = np.asarray(row.roles, dtype=np.uint8)
            by_role += np.bincount(roles, minlength=len(by_role))
            ids_file.write(np.asarray(row.ids, dtype=np.uint32).tobytes())
            roles_file.write(roles.tobytes())
            starts.append(starts[-1] + len(row.ids))
            new = unit == "documents" and row.document not in documents[-1:]
            documents.append(row.document)
            shown.advance(len(row.ids) if unit == "tokens" else int(new))
        held = starts[-1] if unit == "tokens" else len(set(documents))
        if held < max(1, budget or 0):
            what = "the text has no tokens" if starts[-1] == 0 else f"the text has only {held:,} {unit}"
            why = f" ({rows.in_words()})" if isinstance(rows, Packed) else ""
            remedy = f"add text, ask for fewer {unit}, or lower min_tokens"
            raise UnweaveError(what + ("" if budget is None else f", {budget:,} were asked for") + why, remedy=remedy)
    if by_role[Role.PAD]:
        raise UnweaveError(f"{by_role[Role.PAD]} padding tokens are among the text's", remedy="store rows unpadded")
    np.save(folder / "starts.npy", np.asarray(starts, dtype=np.int64))
    np.save(folder / "documents.npy", np.asarray(documents, dtype=np.int64))
    roles_seen = {role.name.lower(): int(by_role[role]) for role in Role}
    return {"rows": len(documents), "tokens": starts[-1], "documents": len(set(documents)), "roles": roles_seen}


def _until(rows: Iterable[Row], budget: int | None, unit: Unit) -> Iterator[Row]:
    """Rows that are not empty, up to the budget."""
    held, last = 0, None
    for row in rows:
        if not row.ids:
            continue
        if unit == "documents" and row.document != last:
            if held == budget:
                return
            held, last = held + 1, row.document
        yield row
        if unit == "tokens":
            held += len(row.ids)
            if budget is not None and held >= budget:
                return
