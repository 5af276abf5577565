"""What is generated: every pair x instruction x strength of every method, in full batches that outlive interruptions.

A job is a prompt with the changes to latents that are in force while it is answered. Jobs of all pairs and methods
share batches (``generate_sweep``); jobs that are alike, as those of the unedited model, are answered once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from unweave.core.errors import UnweaveError
from unweave.core.pieces import Pieces
from unweave.core.progress import Task, task
from unweave.core.site import Site
from unweave.latents.annotations import Pair
from unweave.lm.model import LM
from unweave.methods.axbench.scores import Array
from unweave.methods.axbench.spec import GenerationSpec
from unweave.methods.axbench.texts import ConceptTexts
from unweave.sae.edits import Change, Mode, Where
from unweave.sae.module import SAE
from unweave.sae.steered import generate_sweep, prompt_tokens

T = TypeVar("T")
V = TypeVar("V")
_Row = tuple[str, tuple[Change, ...]]
_CHUNK = 256
"""texts that are generated, or rated, before they are kept"""


@dataclass(frozen=True)
class Setting:
    """A model, its SAEs, and labelled latents of these with their concepts' texts. ``seed``: of all that is drawn."""

    lm: LM
    saes: Mapping[Site, SAE]
    pairs: Sequence[Pair]
    concepts: Mapping[str, ConceptTexts]
    seed: int = 0


@dataclass(frozen=True)
class Handle:
    """What steers one pair by one method: a latent of an SAE, or of one made of learnt directions."""

    sae: SAE
    latent: int
    maximum: float
    """its largest value on the texts, which strengths are multiples of"""
    mode: Mode
    where: Where

    def steered(self, factor: float) -> tuple[Change, ...]:
        """Moved to, or by, ``factor`` times its maximum."""
        return (Change(self.sae, self.latent, factor * self.maximum, self.mode, self.where),)

    def suppressed(self, *, span: bool) -> tuple[Change, ...]:
        """Without what it writes, or without anything along its direction, the SAE's error included."""
        mode: Mode = "project" if span else "multiply"
        return (Change(self.sae, self.latent, 1.0 if span else 0.0, mode, self.where),)


@dataclass(frozen=True)
class Job:
    """One text to write. ``block`` is the experiment, ``row`` its place there: (pair, strength, instruction)."""

    block: str
    row: tuple[int, int, int]
    prompt: str
    changes: tuple[Change, ...] = ()


def draw_instructions(pool: Sequence[str], pairs: int, n: int, seed: int) -> Array:
    """n different instructions for each pair, int64 [pairs, n]. UnweaveError where the pool is smaller."""
    if n > len(pool):
        remedy = "give a larger file of them, or ask for fewer per pair"
        raise UnweaveError(f"{n} instructions per pair, and there are {len(pool)}", where="instructions", remedy=remedy)
    return np.stack([np.random.default_rng([seed, pair]).permutation(len(pool))[:n] for pair in range(pairs)])


def sweep(block: str, pair: int, prompts: Sequence[str], changes: Sequence[tuple[Change, ...]]) -> list[Job]:
    """Every prompt under every strength's changes."""
    return [
        Job(block, (pair, strength, i), prompt, change)
        for strength, change in enumerate(changes)
        for i, prompt in enumerate(prompts)
    ]


def by_chunks(
    items: Sequence[T], work: Callable[[Sequence[T], int, Task], tuple[V, ...]], pieces: Pieces, name: str, kind: Any,
    shown: Task | None = None,
) -> dict[T, V]:  # fmt: skip
    """Each item's value, of type ``kind``: ``work(some, place of the first, progress of all items)``. Equal items are
    worked out once; chunks that are finished are kept in ``pieces``. ``shown``: progress that goes on here."""
    distinct, values = list(dict.fromkeys(items)), {}
    own = task(f"{name} of all pairs", total=len(distinct), unit="texts")
    with own if shown is None else nullcontext(shown) as bar:
        for start in range(0, len(distinct), _CHUNK):
            part, piece = distinct[start : start + _CHUNK], f"{name}-{start:07}"
            if pieces.has(piece):
                bar.advance(len(part))
            of_part = pieces.value(piece, tuple[kind, ...], partial(work, part, start, bar))
            values.update(zip(part, of_part, strict=True))
    return values


def write(
    lm: LM, jobs: Sequence[Job], options: GenerationSpec, seed: int, pieces: Pieces,
    shown: Task | None = None,
) -> list[str]:  # fmt: skip
    """The text of every job, in order. What is finished of them is kept in ``pieces``."""
    prompts = list(dict.fromkeys(job.prompt for job in jobs))
    length = dict(zip(prompts, prompt_tokens(lm, prompts, None).mask.sum(1).tolist(), strict=True))

    def generate(rows: Sequence[_Row], start: int, shown: Task) -> tuple[str, ...]:
        tokens = prompt_tokens(lm, [prompt for prompt, _ in rows], None)
        written = generate_sweep(
            lm, tokens, [changes for _, changes in rows], max_new_tokens=options.max_new_tokens,
            temperature=options.temperature, seed=seed * 1_000_003 + start, shown=shown,
        )  # fmt: skip
        return tuple(written.texts(lm))

    rows = [(job.prompt, job.changes) for job in jobs]
    ordered = sorted(rows, key=lambda row: -length[row[0]])  # little padding
    texts = by_chunks(ordered, generate, pieces, "texts", str, shown)
    return [texts[row] for row in rows]
