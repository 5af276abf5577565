"""Which of a latent's contexts the explainer sees, and which test what it says: never of the same document.

1. Firing contexts are the strongest and those drawn from bands of strength, one per document.
2. Half of those shown are among the strongest; the others, and the tests, come evenly from all bands.
3. Silent tests are random contexts in which the latent does not fire at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from unweave.latents.explaining import fires, marked
from unweave.latents.records import Context, LatentRecord, Records

THRESHOLD = 0.3
"""The share of a context's largest value above which a token is marked."""
_FEWEST = 3
"""contexts of each kind without which a latent is left out"""


@dataclass(frozen=True)
class Examples:
    """A latent's contexts, by what they are for."""

    latent: int
    shown: tuple[Context, ...]
    active: tuple[Context, ...]
    silent: tuple[Context, ...]

    @property
    def marked(self) -> tuple[str, ...]:
        """The contexts shown, with the tokens between << and >> on which the latent fires."""
        return tuple(marked(one, fires(one, THRESHOLD)) for one in self.shown)

    @property
    def tests(self) -> tuple[tuple[Context, bool], ...]:
        """Every test context, and whether the latent fires in it."""
        return (*((one, True) for one in self.active), *((one, False) for one in self.silent))


def choose_examples(record: LatentRecord, shown: int = 10, tests: int = 10, seed: int = 0) -> Examples | None:
    """At most ``shown`` contexts to explain the latent by, and ``tests`` of each kind to test with; None where there
    are too few of some kind."""
    rng = np.random.default_rng([seed, record.latent])
    firing: dict[int, list[Context]] = {}
    documents: set[int] = set()
    for context in (*record.top, *record.quantile):
        if context.value > 0 and context.document not in documents:
            documents.add(context.document)
            firing.setdefault(-1 if context.band is None else context.band, []).append(context)
    bands = [[band[i] for i in rng.permutation(len(band))] for _, band in sorted(firing.items())]
    n_tests = min(tests, len(documents) // 2)
    n_shown = min(shown, len(documents) - n_tests)
    chosen = bands[0][: (n_shown + 1) // 2] if -1 in firing else []
    chosen += _evenly(bands, chosen)[: n_shown - len(chosen)]
    active = _evenly(bands, chosen)[:n_tests]
    seen = {one.document for one in chosen}
    silent = {one.document: one for one in record.random if one.document not in seen and not any(one.values)}
    quiet = [one for one in silent.values() if any(one.counted)][:tests]
    if min(len(chosen), len(active), len(quiet)) < _FEWEST:
        return None
    return Examples(record.latent, tuple(chosen), tuple(active), tuple(quiet))


def _evenly(bands: Sequence[Sequence[Context]], without: Sequence[Context]) -> list[Context]:
    """One of each band, then another of each, and so on; no document of those in ``without``."""
    seen = {one.document for one in without}
    rest = ([one for one in band if one.document not in seen] for band in bands)
    return [one for row in zip_longest(*rest) for one in row if one is not None]


def choose_latents(
    records: Records, latents: Sequence[int], n: int, choose: Callable[[LatentRecord], Examples | None]
) -> list[Examples]:
    """The examples of the first ``n`` of ``latents`` that have enough of them."""
    chosen: list[Examples] = []
    for latent in latents:
        if len(chosen) == n:
            break
        if (examples := choose(records.latent(latent))) is not None:
            chosen.append(examples)
    return chosen


def elsewhere(context: Context, on: Sequence[bool], rng: np.random.Generator) -> list[bool] | None:
    """As many tokens as are ``on``, drawn from those on which the latent does not fire; None where there are fewer."""
    free = [i for i, one in enumerate(context.shown()) if one.counted and one.value == 0]
    if len(free) < sum(on):
        return None
    drawn = set(rng.choice(free, sum(on), replace=False).tolist())
    return [i in drawn for i in range(len(on))]
