"""Reading and editing activations during a forward pass. The only file that hooks into a model.

1. ``taps`` registers plain PyTorch hooks at the sites that are read or edited, and removes them in ``finally``.
2. At a site, edits run first, in the order given; a read sees the edited value, as the rest of the model does.
3. ``stop`` ends the forward pass at a site, after its edits and reads, so later blocks cost nothing.
4. Every value is checked against the shape [batch, position, width]; an edit that changes its input in place is
   refused, since whatever was read before it would silently change too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.chat import Role

if TYPE_CHECKING:
    from unweave.lm.model import LM, Tokens


class Stop(Exception):
    """Ends a forward pass at the last site that is needed."""


@dataclass(frozen=True)
class At:
    """What an edit knows of where it is."""

    site: Site
    ids: Tensor
    """token ids of this forward pass, int64 [B, P]"""
    mask: Tensor
    """True at tokens, False at padding, bool [B, P]"""
    roles: Tensor
    """one Role per token, uint8 [B, P]"""
    step: int
    """0 for the prompt; n for the n-th generated token's pass"""
    read: Mapping[Site, Tensor]
    """values read earlier in this forward pass, [B, P, D]"""


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
    step: int = -1
    batch: tuple[Tensor, Tensor, Tensor] | None = None  # ids, mask, roles of the forward pass under way
    handles: list[Any] = field(default_factory=list)

    def begin(self, ids: Tensor, attention_mask: Tensor | None) -> None:
        """A forward pass of the whole model begins: works out which tokens it holds."""
        self.step += 1
        tokens: Tokens | None = self.lm.current
        if tokens is not None and tokens.ids.shape == ids.shape:
            self.batch = (ids, tokens.mask, tokens.roles)
            return
        n_positions = ids.shape[1]
        mask = torch.ones_like(ids, dtype=torch.bool)
        if attention_mask is not None and attention_mask.ndim == 2:
            mask = attention_mask[:, -n_positions:].bool()
        if tokens is not None and self.step == 0:
            roles = tokens.roles[:, -n_positions:]
        else:
            roles = torch.full_like(ids, Role.ASSISTANT if self.step else Role.TEXT, dtype=torch.uint8)
        self.batch = (ids, mask, roles)

    def at(self, site: Site) -> At:
        if self.batch is None:
            raise UnweaveError("taps saw an activation outside a forward pass of the whole model", where=str(site))
        ids, mask, roles = self.batch
        return At(site, ids, mask, roles, self.step, self.seen)


def _check(site: Site, x: Any, session: Session) -> Tensor:
    """Trap 13: a module may return a tuple or a bare tensor; only [batch, position, width] is accepted."""
    assert session.batch is not None
    wanted = tuple(session.batch[0].shape)
    axes = 1 if site.point == "logits" else 2  # the unembedding may be asked for the last positions only
    if not isinstance(x, Tensor) or x.ndim != 3 or tuple(x.shape[:axes]) != wanted[:axes]:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise UnweaveError(
            f"site {site} holds {shape}, not [batch {wanted[0]}, position {wanted[1]}, width]",
            remedy="this model's code differs from its family's layout; report it",
        )
    return x


def _edited(edit: EditFn, x: Tensor, at: At) -> Tensor | None:
    version = x._version
    new = edit(x, at)
    if x._version != version:
        raise UnweaveError("an edit changed its input in place", where=str(at.site), remedy="return a new tensor")
    if new is None:
        return None
    if new.shape != x.shape or new.dtype != x.dtype:
        raise UnweaveError(
            f"an edit returned {list(new.shape)} {new.dtype} for {list(x.shape)} {x.dtype}",
            where=str(at.site),
            remedy="return a tensor of the same shape and dtype",
        )
    return new


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, (tuple, list)) else out


def _attach(session: Session, site: Site, work: Callable[[Tensor], Tensor | None]) -> None:
    tap = session.lm.layout.tap(site)
    if tap.side == "out":

        def on_output(_module: Any, _args: Any, out: Any) -> Any:
            new = work(_check(site, _first(out), session))
            if new is None:
                return None
            return (new, *out[1:]) if isinstance(out, (tuple, list)) else new

        session.handles.append(tap.module.register_forward_hook(on_output))
    else:

        def on_input(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            named = "hidden_states" in kwargs
            new = work(_check(site, kwargs["hidden_states"] if named else args[0], session))
            if new is None:
                return None
            return (args, {**kwargs, "hidden_states": new}) if named else ((new, *args[1:]), kwargs)

        session.handles.append(tap.module.register_forward_pre_hook(on_input, with_kwargs=True))


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
    found: list[tuple[Site, EditFn, Sequence[Site]]] = []
    several: Iterable[Any] = [edits] if isinstance(edits, SiteEdit) else edits
    for edit in several:
        if not isinstance(edit, SiteEdit):
            raise UnweaveError(
                f"{edit!r} does not say which site it edits", remedy="pass {site: function}, or an edit made by an SAE"
            )
        edit.verify(lm)
        found.append((lm.site(edit.site), edit, [lm.site(s) for s in edit.needs]))
    return found


@contextmanager
def taps(
    lm: LM,
    read: Iterable[str | Site] = (),
    edit: Edits | None = None,
    stop: str | Site | None = None,
    grad: bool = False,
) -> Iterator[Seen]:
    """Hooks a model for the forward passes inside the ``with`` block; see the module's first lines.

    With ``grad`` the values read keep their graph; otherwise they are detached and nothing is recorded.
    """
    edits = _by_site(lm, edit)
    reads = sorted({lm.site(s) for s in read} | {site for _, _, needs in edits for site in needs})
    seen = Seen(reads)
    session = Session(lm, grad, seen)

    def keep(site: Site) -> Callable[[Tensor], None]:
        return lambda x: seen._put(site, x if grad else x.detach())

    def change(site: Site, fn: EditFn) -> Callable[[Tensor], Tensor | None]:
        return lambda x: _edited(fn, x, session.at(site))

    def halt(_x: Tensor) -> None:
        raise Stop

    def begin(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        session.begin(ids, kwargs.get("attention_mask"))

    lm.sessions.append(session)
    try:
        session.handles.append(lm.model.register_forward_pre_hook(begin, with_kwargs=True))
        for site, fn, _ in edits:
            _attach_edit(session, site, change(site, fn))
        for site in reads:
            _attach(session, site, keep(site))
        if stop is not None:
            _attach(session, lm.site(stop), halt)
        yield seen
    finally:
        for handle in session.handles:
            handle.remove()
        lm.sessions.remove(session)
