"""``LM``: a causal language model whose sites can be read and edited, and its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from unweave.core.errors import UnweaveError
from unweave.core.progress import task
from unweave.core.site import Site, matching
from unweave.core.spec import digest
from unweave.lm import chat as chat_roles
from unweave.lm import shown
from unweave.lm import taps as _taps
from unweave.lm import template as templates
from unweave.lm.admission import check_model, check_tokens, confirm_layout, known_ids
from unweave.lm.chat import Role
from unweave.lm.decoding import decode
from unweave.lm.ends import end_ids
from unweave.lm.fingerprint import fingerprint
from unweave.lm.layout import Layout
from unweave.lm.rotary import changing, rows_apart, steady

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Side = Literal["left", "right"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Tokens:
    """A batch of token rows. ids int64 [B, P]; mask bool [B, P], False at padding; roles uint8 [B, P]."""

    ids: Tensor
    mask: Tensor
    roles: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_tokens(self) -> int:
        """How many tokens are not padding."""
        return int(self.mask.sum())

    def rows(self, rows: slice) -> Tokens:
        """Some of the rows."""
        return Tokens(self.ids[rows], self.mask[rows], self.roles[rows])

    def columns(self, columns: slice) -> Tokens:
        """Some of the positions."""
        return Tokens(self.ids[:, columns], self.mask[:, columns], self.roles[:, columns])

    def to(self, device: torch.device | str) -> Tokens:
        return Tokens(self.ids.to(device), self.mask.to(device), self.roles.to(device))

    @classmethod
    def of(cls, ids: Tensor) -> Tokens:
        """Rows of equal length without padding, from token ids [B, P] or [P]."""
        ids = ids.reshape(1, -1) if ids.ndim == 1 else ids
        if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32) or ids.numel() == 0:
            what = f"token ids must be whole numbers [batch, position], not {ids.dtype} {list(ids.shape)}"
            raise UnweaveError(what, remedy="pass lm.tokenize([...]), or an int64 tensor")
        roles = torch.full(ids.shape, Role.TEXT, dtype=torch.uint8, device=ids.device)
        return cls(ids.long(), torch.ones_like(ids, dtype=torch.bool), roles)

    @classmethod
    def pad(cls, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int, side: Side = "right") -> Tokens:
        """Rows of (ids, roles) of any lengths, padded on one side to the longest."""
        width = max((len(ids) for ids, _ in rows), default=0)
        if width == 0:
            raise UnweaveError("there are no tokens", remedy="give text that is not empty")
        ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
        roles = torch.full((len(rows), width), int(Role.PAD), dtype=torch.uint8)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, (row, row_roles) in enumerate(rows):
            span = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            ids[i, span] = torch.as_tensor(row, dtype=torch.int64)
            roles[i, span] = torch.as_tensor(row_roles, dtype=torch.uint8)
            mask[i, span] = True
        return cls(ids, mask, roles)


class LM:
    """A causal language model, its tokenizer (or None: token ids only) and the layout of its sites.

    The model is put in evaluation mode, its parameters are frozen and its outputs are named. Loading confirms the
    layout on a few tokens and raises UnweaveError where it does not hold.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, *, name: str = "", note: str = ""
    ) -> None:
        check_model(model)
        self.model: Any = model.eval().requires_grad_(False)
        self.model.config.return_dict = True  # with False, many families' parts cannot read each other's outputs
        self.tokenizer: Any = tokenizer
        self.layout = Layout(model)
        self.rotaries = changing(model)
        self.name = name or str(getattr(self.model.config, "_name_or_path", "")) or self.model.config.model_type
        self.note = note
        self.sessions: list[_taps.Session] = []
        self.current: Tokens | None = None
        self._fingerprints: dict[Site, dict[str, list[float]]] = {}
        confirm_layout(self)

    @classmethod
    def load(cls, source: str, *, dtype: str = "float32", device: str | None = None) -> Self:
        """A model by catalogue name (see ``unweave models``), hub id, folder or GGUF file.

        ``dtype`` is float32, bfloat16, float16 or float64; ``device`` defaults to a GPU where there is one.
        """
        from unweave.lm.sources import load_pretrained

        if dtype not in _DTYPES:
            raise UnweaveError(f"unknown dtype {dtype!r}", remedy=f"use one of {', '.join(_DTYPES)}")
        try:
            place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            torch.empty(0, device=place)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UnweaveError(
                f"cannot use device {device!r}: {reason}", remedy="use cpu, or cuda where there is a GPU"
            ) from error
        with task(f"load {source.rstrip('/').rpartition('/')[2]}", total=0):
            model, tokenizer, located = load_pretrained(source, _DTYPES[dtype], place)
            return cls(model, tokenizer, name=located.name, note=located.note)

    # -- what it is -----------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def d_model(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def n_layers(self) -> int:
        return self.layout.n_layers

    @property
    def vocab_size(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])

    @cached_property
    def known_ids(self) -> Tensor:
        """The ids that the tokenizer has, int64 [n], ascending; all without one. Embeddings are often padded beyond."""
        return known_ids(self.tokenizer, self.vocab_size)

    @property
    def pad_id(self) -> int:
        """The id that fills padding; always masked, so any id will do."""
        for token_id in (getattr(self.tokenizer, "pad_token_id", None), getattr(self.tokenizer, "eos_token_id", None)):
            if token_id is not None:  # 0 is a fine id (trap 5)
                return int(token_id)
        return 0

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every id at which generation ends: the model's, tokenizer's and chat template's; see ``lm/ends.py``."""
        return end_ids(self.model, self.tokenizer, self.vocab_size)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The tokenizer's special tokens, e.g. those that begin and end a turn."""
        return () if self.tokenizer is None else tuple(sorted(chat_roles.special_ids(self.tokenizer)))

    def sites(self) -> list[Site]:
        """Every named site in execution order."""
        return list(self.layout.sites())

    def site(self, site: str | Site) -> Site:
        """A site of this model. Raises UnweaveError for one that it does not have."""
        parsed = Site.parse(site)
        self.layout.tap(parsed)
        return parsed

    def matching(self, patterns: Sequence[str]) -> list[tuple[Site, Site]]:
        """Pairs (read, write) of sites that patterns such as ``resid_post.*`` or ``mlp_in.*->mlp_add.*`` name."""
        pairs = dict.fromkeys(pair for pattern in patterns for pair in matching(pattern, self.sites()))
        return [(self.site(read), self.site(write)) for read, write in pairs]

    def width(self, site: str | Site) -> int:
        """The size of the last dimension at a site."""
        parsed = self.site(site)
        with self.taps(read=[parsed], stop=parsed) as seen:
            self(self.probe())
        return seen[parsed].shape[-1]

    def __repr__(self) -> str:
        note = f", {self.note}" if self.note else ""
        return f"LM({self.name}: {self.model.config.model_type}, {self.n_layers} layers, d {self.d_model}{note})"

    # -- text and tokens ------------------------------------------------------------------------------------------

    def _needs_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise UnweaveError(
                "this LM has no tokenizer", remedy="pass token ids, or make it with LM(model, tokenizer)"
            )
        return self.tokenizer

    def tokenize(self, texts: str | Sequence[str], side: Side = "right") -> Tokens:
        """Plain texts as tokens [B, P], exactly as the tokenizer does it (trap 3: never a second BOS)."""
        tokenizer = self._needs_tokenizer()
        texts = [texts] if isinstance(texts, str) else list(texts)
        return Tokens.pad([chat_roles.encode_text(tokenizer, text) for text in texts], self.pad_id, side)

    def chat(
        self,
        conversations: Sequence[Sequence[dict[str, str]]],
        *,
        side: Side = "right",
        add_generation_prompt: bool = False,
    ) -> Tokens:
        """Conversations (lists of ``{"role", "content"}``) under the model's chat template, with a role per token."""
        tokenizer = self._needs_tokenizer()
        rows = [
            chat_roles.render(tokenizer, messages, add_generation_prompt=add_generation_prompt)
            for messages in conversations
        ]
        return Tokens.pad(rows, self.pad_id, side)

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of token ids, special tokens left out."""
        return self._needs_tokenizer().decode(list(map(int, ids)), skip_special_tokens=True)

    def token_strings(self, ids: Iterable[int] | Tensor) -> list[str]:
        """Each token's text on its own, space before it and special tokens included; ``pieces`` for those of a row."""
        return shown.alone(self._needs_tokenizer(), [int(i) for i in ids])

    def pieces(self, ids: Iterable[int] | Tensor) -> list[str]:
        """The tokens of one row as pieces that joined are the decoded row; see ``lm/shown.py``."""
        return [piece.text for piece in shown.pieces(self._needs_tokenizer(), [int(i) for i in ids])]

    def tokenizer_fingerprint(self) -> str | None:
        """Twelve digits over vocabulary, special tokens and chat template, with the date given to it where this is
        not the usual one; None without a tokenizer (trap 10)."""
        if self.tokenizer is None:
            return None
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return digest([vocabulary, list(self.special_ids), *templates.identity(self.tokenizer)])

    # -- running it -----------------------------------------------------------------------------------------------

    def taps(
        self,
        read: Iterable[str | Site] = (),
        edit: _taps.Edits | None = None,
        stop: str | Site | None = None,
        grad: bool = False,
        start: _taps.Start | None = None,
        newest: bool = False,
    ) -> AbstractContextManager[_taps.Seen]:
        """Reads and edits activations in the forward passes of a ``with`` block; see ``lm/taps.py``.

        >>> with lm.taps(read=["resid_post.9"], stop="resid_post.9") as seen:
        ...     lm(lm.tokenize(["The keys to the cabinet"]))
        >>> seen["resid_post.9"].shape                               # [batch, position, d_model]
        """
        return _taps.taps(self, read, edit, stop, grad, start, newest)

    def __call__(self, tokens: Tokens | Tensor, *, keep_logits: int | Tensor = 0) -> Tensor | None:
        """Logits [B, P, V] of a forward pass, or None where taps stopped it.

        ``keep_logits`` computes only those of the last so many positions, or of the positions given (int64 [K]).
        Positions count from each row's first token, whatever the padding side (trap 1). Gradients are recorded only
        inside ``taps(grad=True)``.
        """
        batch = self.admitted(tokens if isinstance(tokens, Tokens) else Tokens.of(tokens))
        extra: dict[str, Tensor] = {}
        # Causal attention sees padding on the left. On the right positions would run on, past a table's end perhaps.
        width = batch.ids.shape[1]
        if self.rotaries or (self.layout.n_positions or width) < width or not bool(batch.mask[:, 0].all()):
            extra["attention_mask"] = batch.mask.long()
            extra["position_ids"] = (batch.mask.long().cumsum(-1) - 1).clamp(min=0)
        grad = any(session.grad for session in self.sessions)
        options = {"use_cache": False, "logits_to_keep": keep_logits, "return_dict": True}
        with self.running(batch), torch.set_grad_enabled(grad):
            try:
                out = self.model(input_ids=batch.ids, **options, **extra)
            except _taps.Stop:
                return None
        return out[0] if isinstance(out, tuple) else out.logits

    def admitted(self, tokens: Tokens, new: int = 0) -> Tokens:
        """Tokens on the model's device. UnweaveError for what it cannot read, or has no room for with ``new`` more."""
        check_tokens(self.model, self.layout, tokens, new)
        return tokens.to(self.device)

    @contextmanager
    def running(self, tokens: Tokens) -> Iterator[None]:
        """Within, forward passes of the model are of these tokens, and of what is generated behind them."""
        self.current = tokens
        try:
            with rows_apart(self.rotaries):
                yield
        finally:
            self.current = None

    def generate(
        self,
        prompt: str | Sequence[str] | Tokens,
        edit: _taps.Edits | None = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        chat: bool | None = None,
        persist: bool = True,
    ) -> Any:
        """Continues prompts, with edits at every step; a string for one prompt, a list of strings for several.

        ``chat`` puts each prompt in the model's chat template as the user's turn; None does so where there is one.
        Greedy at temperature 0, otherwise sampled from the whole distribution with ``seed``. Text only, no special
        tokens. Generation stops at the first of ``end_ids``. ``persist`` as in ``generate_ids``.
        """
        if isinstance(prompt, Tokens):
            tokens = prompt
        else:
            texts = [prompt] if isinstance(prompt, str) else list(prompt)
            template = getattr(self._needs_tokenizer(), "chat_template", None)
            if chat if chat is not None else template is not None:
                talks = [[{"role": "user", "content": text}] for text in texts]
                tokens = self.chat(talks, side="left", add_generation_prompt=True)
            else:
                tokens = self.tokenize(texts, side="left")
        ids = self.generate_ids(
            tokens, edit, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, persist=persist
        )
        texts = [self.decode(row) for row in ids]
        return texts[0] if isinstance(prompt, str) else texts

    def generate_ids(
        self,
        tokens: Tokens,
        edit: _taps.Edits | None = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
        persist: bool = True,
    ) -> Tensor:
        """The new token ids [B, up to max_new_tokens]; rows that ended early are filled with ``pad_id``.

        ``seed``: one, or one for each row, whose text then is the same in any batch. ``persist`` False: edits change
        what the model says and not what it remembers; see ``lm/decoding.py``.
        """
        if not bool(tokens.mask[:, -1].all()):
            raise UnweaveError("generation needs padding on the left", remedy='tokenize with side="left"')
        if max_new_tokens < 1 or not temperature >= 0:
            raise UnweaveError(f"cannot generate {max_new_tokens} tokens at temperature {temperature}")
        new = decode(
            self, tokens, edit, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, persist=persist
        )
        return torch.stack(list(new), 1)

    def may_cache(self, lengths: Tensor, new: int) -> bool:
        """Whether keys stay right while ``new`` tokens are added to rows of these lengths; see ``lm/rotary.py``."""
        return steady(self.rotaries, lengths, new)

    def logit_lens(self, directions: Tensor) -> Tensor:
        """What directions [n, D] of the residual stream write to the logits [n, V]: final norm, then unembedding.

        Each direction is normalised by the final norm as if it were the whole stream; biases are taken off.
        """
        norm = self.model.get_submodule(self.layout.family.final_norm)
        head = self.model.get_output_embeddings()
        with torch.no_grad():
            rows = directions.to(self.device, self.dtype)
            return head(norm(rows)) - head(norm(torch.zeros_like(rows[:1])))

    # -- trust ----------------------------------------------------------------------------------------------------

    def probe(self, n: int = 16) -> Tokens:
        """A row of fixed tokens."""
        return Tokens.of((torch.arange(n) * 7919 + 13) % self.vocab_size)

    def fingerprint(self, site: str | Site) -> dict[str, list[float]]:
        """What fixed tokens do at a site, by which these weights are recognised; see ``lm/fingerprints.py``."""
        parsed = self.site(site)
        if parsed not in self._fingerprints:
            self._fingerprints[parsed] = fingerprint(self, parsed)
        return self._fingerprints[parsed]
