"""Reading and editing activations during a forward pass. The only file that hooks into a model.

1. ``taps`` registers plain PyTorch hooks at the sites that are read or edited, and removes them in ``finally``.
2. At a site, edits run first, in the order given; a read sees the edited value, as the rest of the model does.
3. ``stop`` ends the forward pass at a site, after its edits and reads, so later blocks cost nothing.
4. ``start`` begins the forward pass at a residual site: the blocks below return what they are given, and the value
   takes the stream's place before the first block that runs. The model makes masks and position embeddings as ever.
5. Every value is checked against the shape [batch, position, width]; an edit that changes its input in place is
   refused, since whatever was read before it would silently change too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.at import At, roles_so_far
from unweave.lm.chat import Role
from unweave.lm.layout import Tap
from unweave.lm.shortcuts import skipped

if TYPE_CHECKING:
    from unweave.lm.model import LM, Tokens


class Stop(Exception):
    """Ends a forward pass at the last site that is needed."""


EditFn = Callable[[Tensor, At], "Tensor | None"]
"""Gets the activation [B, P, D] and where it is; returns the new one, or None to leave it alone."""


@runtime_checkable
class SiteEdit(Protocol):
    """An edit that knows its site, which sites it reads, and which models it was made for."""

    @property
    def site(self) -> Site: ...

    @property
    def needs(self) -> Sequence[Site]: ...

    def verify(self, lm: LM) -> None: ...

    def __call__(self, x: Tensor, at: At) -> Tensor | None: ...


Start = tuple["str | Site", Tensor]
"""Where a forward pass begins (resid_pre.l, resid_post.l or embed), and the value [B, P, D] that it begins with."""

Edits = SiteEdit | Iterable[SiteEdit] | Mapping[Any, EditFn]


class Seen(Mapping[Site, Tensor]):
    """What was read, by site or site name. A value changed in place by the model after it was read is refused."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self._sites = list(sites)
        self._values: dict[Site, tuple[Tensor, int]] = {}

    def __getitem__(self, key: str | Site) -> Tensor:
        site = Site.parse(key)
        if site not in self._values:
            hint = "it was not asked for" if site not in self._sites else "no forward pass has reached it"
            raise UnweaveError(f"site {site} was not read: {hint}", remedy="see read= and stop= of taps")
        value, version = self._values[site]
        if value._version != version:
            raise UnweaveError(f"the value read at {site} was changed in place", remedy="report this model's family")
        return value

    def __iter__(self) -> Iterator[Site]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def _put(self, site: Site, value: Tensor) -> None:
        self._values[site] = (value, value._version)


@dataclass(eq=False)
class Session:
    """The taps of one ``with`` block."""

    lm: LM
    grad: bool
    seen: Seen
    begins: Begins | None = None
    taken: dict[Site, nn.Module] = field(default_factory=dict)
    """the sites read, edited or stopped at, with the module that each hangs on"""
    step: int = -1
    started: Tokens | None = None
    """the tokens of ``lm.current`` whose first forward pass has begun; further passes of them are a generation's"""
    batch: tuple[Tensor, Tensor, Tensor] | None = None
    """ids and mask [B, P] of the forward pass under way, and the roles of its rows so far [B, N]"""
    handles: list[Any] = field(default_factory=list)

    def begin(self, ids: Tensor, attention_mask: Tensor | None) -> None:
        """A forward pass of the whole model begins: works out which tokens it holds."""
        self.step += 1
        tokens: Tokens | None = self.lm.current
        first = tokens is not self.started
        self.started = tokens
        if tokens is not None and first and tokens.ids.shape == ids.shape:
            self.batch = (ids, tokens.mask, tokens.roles)
            return
        n_positions = ids.shape[1]
        seen = attention_mask.shape[1] if attention_mask is not None and attention_mask.ndim == 2 else None
        mask = torch.ones_like(ids, dtype=torch.bool)
        if attention_mask is not None and seen is not None:
            mask = attention_mask[:, -n_positions:].bool()
        row = torch.full_like(ids, Role.ASSISTANT if self.step else Role.TEXT, dtype=torch.uint8)
        if tokens is not None:
            row = roles_so_far(tokens.roles, n_positions, seen)
        self.batch = (ids, mask, row)

    def at(self, site: Site) -> At:
        if self.batch is None:
            raise UnweaveError("taps saw an activation outside a forward pass of the whole model", where=str(site))
        ids, mask, row = self.batch
        return At(site, ids, mask, row[:, -ids.shape[1] :], self.step, self.seen, row)


@dataclass(frozen=True, eq=False)
class Begins:
    """Where the forward passes of a session begin: before ``tap``'s module, with ``skipped`` blocks left out."""

    site: Site
    value: Tensor
    tap: Tap
    skipped: tuple[nn.Module, ...]

    @classmethod
    def of(cls, lm: LM, start: Start) -> Begins:
        site, value = lm.site(start[0]), start[1]
        layout = lm.layout
        if site.point == "embed":
            return cls(site, value, layout.tap(site), ())
        if site.point not in ("resid_pre", "resid_post") or site.layer is None:
            raise UnweaveError(
                f"a forward pass cannot begin at {site}", remedy="begin at resid_pre.L, resid_post.L or embed"
            )
        first = site.layer + (site.point == "resid_post")  # the first block that runs
        above = lm.model.get_submodule(layout.family.final_norm) if first == lm.n_layers else layout.blocks[first]
        return cls(site, value, Tap(above, "in"), tuple(layout.blocks[:first]))

    def attach(self, session: Session) -> None:
        """Replaces what the skipped blocks do, and puts the value in before anything else sees the stream there."""
        for block, wrapped in zip(self.skipped, session.lm.layout.wrapped, strict=False):
            session.handles.append(skipped(block, wrapped))

        def put(x: Tensor) -> Tensor:
            expected = tuple(x.shape)
            if not isinstance(self.value, Tensor) or tuple(self.value.shape) != expected:
                raise UnweaveError(
                    f"the forward pass begins with {list(getattr(self.value, 'shape', ()))}, not with {list(expected)}",
                    where=str(self.site),
                    remedy="give one row per row of tokens",
                )
            return self.value.to(x.dtype)

        _hook(session, self.tap, self.site, put, first=True)

    def reached(self, lm: LM) -> set[nn.Module]:
        """The modules that are run, and on what comes of the value."""
        runs = (*lm.layout.blocks[len(self.skipped) :], lm.model.get_submodule(lm.layout.family.final_norm))
        wholes = (*runs, lm.model.get_output_embeddings(), self.tap.module)
        return {part for whole in wholes for part in whole.modules()}


def _check_begins(lm: LM) -> None:
    """What any open session reads or edits must lie where the forward pass still goes."""
    begun = [session.begins for session in lm.sessions if session.begins is not None]
    if len(begun) > 1:
        raise UnweaveError("two taps say where the pass begins", remedy="give start= once")
    for begins in begun:
        reached = None if begins.site.point == "embed" else begins.reached(lm)
        for session in lm.sessions:
            for site, module in session.taken.items():
                if reached is not None and module not in reached:
                    remedy = "begin lower, or read and edit above"
                    raise UnweaveError(f"site {site} lies below {begins.site}, where the pass begins", remedy=remedy)


def _check(site: Site, x: Any, session: Session) -> Tensor:
    """Trap 13: a module may return a tuple or a bare tensor; only [batch, position, width] is accepted."""
    assert session.batch is not None
    expected = tuple(session.batch[0].shape)
    axes = 1 if site.point == "logits" else 2  # the unembedding may be asked for the last positions only
    if not isinstance(x, Tensor) or x.ndim != 3 or tuple(x.shape[:axes]) != expected[:axes]:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        what = f"site {site} holds {shape}, not [batch {expected[0]}, position {expected[1]}, width]"
        raise UnweaveError(what, remedy="this model's code differs from its family's layout; report it")
    return x


def _edited(edit: EditFn, x: Tensor, at: At, newest: bool) -> Tensor | None:
    version = x._version
    new = edit(x, at)
    if x._version != version:
        raise UnweaveError("an edit changed its input in place", where=str(at.site), remedy="return a new tensor")
    if new is None:
        return None
    if new.shape != x.shape or new.dtype != x.dtype:
        what = f"an edit returned {list(new.shape)} {new.dtype} for {list(x.shape)} {x.dtype}"
        raise UnweaveError(what, where=str(at.site), remedy="return a tensor of the same shape and dtype")
    return torch.cat([x[:, :-1], new[:, -1:]], 1) if newest else new


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, (tuple, list)) else out


def _tap(session: Session, site: Site) -> Tap:
    """Where a site is tapped: where the pass begins after a block, that block's output is the next module's input."""
    begins = session.begins
    return begins.tap if begins is not None and site == begins.site else session.lm.layout.tap(site)


def _attach(session: Session, site: Site, work: Callable[[Tensor], Tensor | None]) -> None:
    tap = _tap(session, site)
    session.taken[site] = tap.module
    _hook(session, tap, site, work)


def _hook(session: Session, tap: Tap, site: Site, work: Callable[[Tensor], Tensor | None], first: bool = False) -> None:
    if tap.side == "out":

        def on_output(_module: Any, _args: Any, out: Any) -> Any:
            new = work(_check(site, _first(out), session))
            if new is None:
                return None
            return (new, *out[1:]) if isinstance(out, (tuple, list)) else new

        session.handles.append(tap.module.register_forward_hook(on_output, prepend=first))
    else:

        def on_input(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            named = "hidden_states" in kwargs
            new = work(_check(site, kwargs["hidden_states"] if named else args[0], session))
            if new is None:
                return None
            return (args, {**kwargs, "hidden_states": new}) if named else ((new, *args[1:]), kwargs)

        session.handles.append(tap.module.register_forward_pre_hook(on_input, with_kwargs=True, prepend=first))


def _attach_edit(session: Session, site: Site, work: Callable[[Tensor], Tensor | None]) -> None:
    """Between attention and MLP the residual stream is no module's output, and the norm there sees only a copy of it.

    So ``resid_mid`` is edited through what attention adds: the block's input plus attention's addition is the stream.
    """
    if site.point != "resid_mid":
        _attach(session, site, work)
        return
    assert site.layer is not None
    before: list[Tensor] = []

    def keep(x: Tensor) -> None:
        before[:] = [x]

    def through_attention(added: Tensor) -> Tensor | None:
        mid = before.pop() + added
        new = work(mid)
        return None if new is None else added + (new - mid)

    session.lm.layout.tap(site)  # refuses where there is no such site
    _attach(session, Site("resid_pre", site.layer), keep)
    _attach(session, Site("attn_add", site.layer), through_attention)


def _by_site(lm: LM, edits: Edits | None) -> list[tuple[Site, EditFn, Sequence[Site]]]:
    if edits is None:
        return []
    if isinstance(edits, Mapping):
        by_site: Mapping[Any, Any] = edits
        return [(lm.site(site), fn, ()) for site, fn in by_site.items()]
    triples: list[tuple[Site, EditFn, Sequence[Site]]] = []
    several: Iterable[Any] = [edits] if isinstance(edits, SiteEdit) else edits
    for edit in several:
        if not isinstance(edit, SiteEdit):
            raise UnweaveError(
                f"{edit!r} does not say which site it edits", remedy="pass {site: function}, or an edit made by an SAE"
            )
        edit.verify(lm)
        triples.append((lm.site(edit.site), edit, [lm.site(s) for s in edit.needs]))
    return triples


@contextmanager
def taps(
    lm: LM,
    read: Iterable[str | Site] = (),
    edit: Edits | None = None,
    stop: str | Site | None = None,
    grad: bool = False,
    start: Start | None = None,
    newest: bool = False,
) -> Iterator[Seen]:
    """Hooks a model for the forward passes inside the ``with`` block; see the module's first lines.

    With ``grad`` the values read keep their graph; otherwise they are detached and nothing is recorded. With ``start``
    the forward pass begins at a site with the value given, [B, P, D] (cast to the stream's dtype, gradients flow to
    it): blocks below it are not computed, and sites below it can be neither read nor edited. With ``newest`` only the
    last position of every pass is edited.
    """
    edits = _by_site(lm, edit)
    reads = sorted({lm.site(s) for s in read} | {site for _, _, needs in edits for site in needs})
    seen = Seen(reads)
    session = Session(lm, grad, seen, None if start is None else Begins.of(lm, start))

    def keep(site: Site) -> Callable[[Tensor], None]:
        return lambda x: seen._put(site, x if grad else x.detach())

    def change(site: Site, fn: EditFn) -> Callable[[Tensor], Tensor | None]:
        return lambda x: _edited(fn, x, session.at(site), newest)

    def halt(_x: Tensor) -> None:
        raise Stop

    def begin(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if session.begins is not None and (kwargs.get("use_cache") or kwargs.get("past_key_values") is not None):
            raise UnweaveError("a forward pass with a cache cannot begin above its blocks", remedy="generate without")
        session.begin(ids, kwargs.get("attention_mask"))

    lm.sessions.append(session)
    try:
        session.handles.append(lm.model.register_forward_pre_hook(begin, with_kwargs=True))
        if session.begins is not None:
            session.begins.attach(session)
        for site, fn, _ in edits:
            _attach_edit(session, site, change(site, fn))
        for site in reads:
            _attach(session, site, keep(site))
        if stop is not None:
            _attach(session, lm.site(stop), halt)
        _check_begins(lm)
        yield seen
    finally:
        for handle in session.handles:
            handle.remove()
        lm.sessions.remove(session)


@contextmanager
def what_blocks_return(lm: LM) -> Iterator[list[bool]]:
    """Whether each block returns a tuple (trap 13), filled in by a forward pass in the ``with`` block."""
    wrapped = [False] * lm.n_layers

    def look(place: int) -> Callable[[Any, Any, Any], None]:
        def on_output(_module: Any, _args: Any, out: Any) -> None:
            wrapped[place] = isinstance(out, (tuple, list))

        return on_output

    with ExitStack() as stack:
        for place, block in enumerate(lm.layout.blocks):
            stack.callback(block.register_forward_hook(look(place)).remove)
        yield wrapped
