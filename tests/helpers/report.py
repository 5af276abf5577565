"""Results of every command with made-up numbers, and the page that shows them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from unweave.core.result import Result
from unweave.core.run import Run
from unweave.core.site import Site
from unweave.core.spec import Spec
from unweave.inputs.subject import SAEInfo, Subject
from unweave.latents.result import LatentRecords, SiteRecords
from unweave.methods import command_of
from unweave.methods.evaluate.result import Evaluation
from unweave.methods.report import page as pages
from unweave.methods.report.runs import Shown
from unweave.methods.steer.result import Sample, Steering
from unweave.methods.trace.result import Agreement, Effect, Example, Totals, Trace
from unweave.methods.train.result import Reference, TrainedSAE, Training
from unweave.sae.measure.result import Density, Metrics
from unweave.show.model import ContextEntry, LatentEntry


def entry(index: int, tokens: list[str] | None = None) -> LatentEntry:
    tokens = tokens or [" the", " keys", " to", " the", " cabinet", " are"]
    acts = [0.0] * len(tokens)
    acts[-1] = 4.0 + index / 10
    acts[1] = 0.01
    contexts = [
        ContextEntry("top", tokens, acts, len(tokens) - 1),
        ContextEntry("quantile", tokens[::-1], [value / 2 for value in acts[::-1]], 0, "50 %"),
        ContextEntry("random", tokens, [-1.0] * len(tokens), 2),
    ]
    return LatentEntry(index, 0.0042, 4.0 + index / 10, [(tokens[0], 0.5)], [(tokens[1], -0.25)], contexts)


SITE = Site("resid_post", 9)
SUBJECT = Subject("tiny-model", "dequantised from Q4_1", (SAEInfo(SITE, "topk", 576, 8, 32, "ab" * 6),), {})


def training() -> Training:
    sae = TrainedSAE("", SITE, SITE, "topk", 576, 8, 32, Path("sae"), Reference(0.18, 32.0, 5000))
    return Training("tiny-model", "", 2_000_000, 480_000, 4.17, 0, 0, {}, (), (SITE,), 1, (sae,))


def evaluation(**changes: Any) -> Evaluation:
    metrics = Metrics(
        metric_set="set/1", site=str(SITE), tokens=21_000, excluded={"special tokens": 77}, unexplained_variance=0.18,
        explained_variance=0.82, mse=0.2, cosine=0.9, norm_ratio=0.99, l0=32.0, l1=90.0, alive_fraction=0.9,
        density=Density((-4.0, -3.0, -2.0, -1.0), (0, 5, 2), 1), unexplained_variance_all_tokens=0.2,
        l0_all_tokens=33.0, predictions=20_000, ce_clean=3.0, ce_sae=3.1, ce_mean=7.0, ce_zero=9.0, kl_sae=0.1,
        kl_mean=3.0, kl_zero=5.0, recovered_vs_mean=0.975, recovered_vs_zero=None, notes=("A note.",),
    )  # fmt: skip
    return Evaluation(SUBJECT, replace(metrics, **changes), ("L0 is 32.0 here and was 12.0",))


def trace() -> Trace:
    effects = [Effect(j, True, 0.9 / (1 + j), 0.7 / (1 + j), 1 / (1 + j), 1 / (1 + j)) for j in range(4)]
    effects += [Effect(5, False, 0.012, 0.008, 0.01, 0.01), Effect(6, True, 0.2, 0.1, 0.15, 0.15)]
    agreements = tuple(
        Agreement(estimate, among, 0.98, None if estimate == "attribution" else 0.7)
        for among in ("chosen", "weaker", "random")
        for estimate in ("ig", "attribution", "exact")
    )
    return Trace(
        subject=SUBJECT, task="across_pp", site=SITE, examples=120, right_clean=0.9, right_patch=0.95,
        example=Example("The keys", " are", "The key", " is"), effects=tuple(effects), agreements=agreements, share=0.8,
        totals=Totals(-2.0, 2.0, 3.2, 4.0, 0.3, 3.8, 0.2), sums=(), problem=None, diagnosis=None,
        pairs_file=Path("pairs.jsonl"),
    )  # fmt: skip


def steering() -> Steering:
    samples = (
        Sample("Tell me.", None, "A walk.", None, 1.0, 3.0),
        Sample("Tell me.", 4.0, "The sea & the sea.", 0.5, 0.9, 4.0),
    )
    return Steering(SUBJECT, 3, (" sea",), 0.5, (), "clamp", 4.3, 1000, samples)


def records(n: int = 8) -> LatentRecords:
    return LatentRecords(SUBJECT, (SiteRecords(SITE, 200_000, n, n - 1, 0.1, Path("records")),))


RESULTS: dict[str, Callable[[], Result]] = {
    "train": training,
    "eval": evaluation,
    "latents": records,
    "trace": trace,
    "steer": steering,
}
ENTRIES = {e.index: e for e in [*map(entry, range(7)), LatentEntry(7, 0.0, 0.0)]}


@dataclass(frozen=True, kw_only=True)
class Nothing(Spec):
    """A question."""

    lr: float = 0.001


def render(results: dict[str, Result], entries: dict[int, LatentEntry] = ENTRIES, limit: int | None = None) -> str:
    """A page of these results as if each were in a run about one SAE, with these records."""
    missing = [name for name in ("eval", "latents", "trace", "steer") if name not in results]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "_entries", lambda *_: dict(entries))
        shown = []
        for name, result in results.items():
            with Run.open(Path(folder), name, Nothing(), inputs={"sae": "cd" * 6}, kind=type(result)) as run:
                if name == "train":
                    for i in range(1, 50):
                        run.log("train", {"site": str(SITE), "tokens": 100_000 * i, "fvu": 1 / i, "dead": 0.8})
                run.finish(result)
                (run.path / "costs.json").write_text('{"seconds": 312.0}')
                (run.path / "env.json").write_text("{}")
            command = command_of(name)
            assert command is not None
            shown.append(Shown(run, command, run.result))
        return pages.render("A report & more", shown, missing, limit)


def full() -> dict[str, Result]:
    return {name: make() for name, make in RESULTS.items()}


@cache
def full_page() -> str:
    return render(full())
