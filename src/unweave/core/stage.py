"""The one scaffold of stages: a question in, a finished run with a typed result out.

1. What is asked is identified: the Spec's fields that can change the result, the stage's version, and the content of
   everything that the Spec names (a field's type says how: ``core.refs``).
2. A run that has finished is returned; nothing is loaded.
3. Otherwise the stage works inside the run: locked, timed, logged; its pieces survive an interruption (``ctx.pieces``).
4. Its result is written, and last of all ``DONE``.

    @stage("eval", version=3)
    def run(spec: EvalSpec, ctx: Context) -> Evaluation: ...

    done = run(spec, Path("runs"))
    done.result.unexplained_variance, done.path, done.reused
"""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from unweave.core.dist import SOLO, Group, world
from unweave.core.refs import contents_of
from unweave.core.result import Result
from unweave.core.run import Run
from unweave.core.spec import Spec

if typing.TYPE_CHECKING:
    from unweave.core.pieces import Pieces

S = TypeVar("S", bound=Spec)
R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Context:
    """What a stage works with beside its Spec: its run, the folder of all runs, the digests of what it reads, by field,
    and the processes that share the work."""

    run: Run[Any]
    runs: Path
    inputs: Mapping[str, str]
    group: Group = SOLO
    handle: Any = None
    """what the caller had open already, as a model"""

    @property
    def path(self) -> Path:
        """The run's folder, where outputs go."""
        return self.run.path

    @cached_property
    def pieces(self) -> Pieces:
        """Finished pieces of the work, gone when the run is done."""
        from unweave.core.pieces import Pieces

        return Pieces(self.path / "parts")

    def log(self, event: str, fields: Mapping[str, Any] | None = None) -> None:
        """Appends a line to log.jsonl."""
        self.run.log(event, fields)


@dataclass(frozen=True)
class Stage(Generic[S, R]):
    """A function of a Spec and a folder of runs. ``also(spec, handle)``: what else than the Spec's fields is read."""

    name: str
    version: int
    work: Callable[[S, Context], R]
    also: Callable[[S, Any], Mapping[str, str]] | None = None
    together: bool = False
    """whether several processes (torchrun) work on one run; else each is on its own"""

    @cached_property
    def result(self) -> type[R]:
        """The class of its results."""
        return typing.get_type_hints(self.work)["return"]

    def inputs(self, spec: S, handle: Any = None) -> dict[str, str]:
        """The digests of everything that is read, for the run's identity. UnweaveError for what cannot be read."""
        return contents_of(spec) | dict(self.also(spec, handle) if self.also is not None else {})

    def __call__(self, spec: S, runs: Path, handle: Any = None) -> Run[R]:
        """The finished run; what has finished before is returned as it is. ``handle``: what the stage says it takes,
        where it is open already."""
        inputs = self.inputs(spec, handle)
        run = Run.open(Path(runs), self.name, spec, version=self.version, inputs=inputs, kind=self.result)
        group = world() if self.together else SOLO
        with _entered(run, group):
            if not run.done:
                result = self.work(spec, Context(run, Path(runs), inputs, group, handle))
                if group.rank == 0:
                    run.finish(result)
                group.barrier()
        return run


def stage(
    name: str, *, version: int, also: Callable[[S, Any], Mapping[str, str]] | None = None, together: bool = False
) -> Callable[[Callable[[S, Context], R]], Stage[S, R]]:
    """Makes a stage of ``work(spec, ctx) -> result``. Raise ``version`` when results change."""
    return lambda work: Stage(name, version, work, also, together)


@contextlib.contextmanager
def _entered(run: Run[Any], group: Group) -> Iterator[None]:
    """Of several processes (torchrun) the first holds the run's lock; the others work beside it."""
    with run if group.rank == 0 else contextlib.nullcontext(run):
        group.barrier()
        yield
