"""What the paper claims, beside what came out here. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from unweave.core.intervals import Interval, interval
from unweave.methods.axbench.result import Rated
from unweave.papers.claims import Claim, Verdict
from unweave.papers.labelled_steering.plan import HIGH, LOW
from unweave.papers.labelled_steering.result import F1, LabelledSteering, Steered
from unweave.show.pieces import bounded

_CLOSE = 0.1
"""a difference in rating, of 2, below which two are about as good"""
_MODEST = 0.5
_UNMEASURED = (
    ("Figure 1 and the examples of appendices C and D: texts steered well, and texts that the judge got wrong",
     "some of ours are below; all are in generations.parquet of each comparison, with every rating"),
    ("scores vary from forum to forum (Figures 2 and 6)", "ours by source are in the table below"),
    ("labels of Neuronpedia on random latents score 0.14 to 0.19, on the pipeline's latents more (Figures 2 and 8)",
     "needs Neuronpedia's labels of the same SAEs; random latents with the pairs' labels stand in their place above"),
    ("students rate steered texts somewhat more kindly than GPT-4o-mini, without a clear bias for a method",
     "nobody was asked; how well each judge tells known cases apart is below"),
    ("with Llama-3.1-8B-Instruct and Llama Scope the pipeline did not steer well (appendix E)",
     "`unweave labels` and `unweave axbench` take these SAEs; they were not run"),
)  # fmt: skip


def mean(rated: Sequence[Rated], part: int | None = None) -> Interval | None:
    """The rating over pairs, or one of its parts, with its interval over concepts."""
    return interval([_value(one, part) for one in rated], [one.concept for one in rated])


def gain(
    runs: Sequence[Steered], method: str, other: str, part: int | None = None, within: str = ""
) -> Interval | None:
    """One method's rating (or a part of it) less another's, pair by pair; ``within`` a site only."""
    both = [(a, b) for run in runs for a, b in zip(run.of(method), run.of(other), strict=False)]
    both = [(a, b) for a, b in both if a.pair.startswith(within)]
    return interval([_value(a, part) - _value(b, part) for a, b in both], [a.concept for a, _ in both])


def between(one: Sequence[Rated], other: Sequence[Rated]) -> Interval | None:
    """By how much the mean rating of the concepts that both have differs."""
    means = [_by_concept(some) for some in (one, other)]
    shared = sorted(means[0].keys() & means[1].keys())
    return interval([means[0][name] - means[1][name] for name in shared], shared)


def claims(result: LabelledSteering) -> list[Claim]:
    """Every claim, figure and table of the paper with our figure and a verdict."""
    unmeasured = [Claim(claim, ours, "not measured") for claim, ours in _UNMEASURED]
    return [*_steering(result), *_ablations(result), _simulated(result), *_labels(result), *unmeasured]


def _steering(result: LabelledSteering) -> list[Claim]:
    runs = result.pairs(LOW)
    random, lora, prompt = (gain(runs, "sae", name) for name in ("random", "lora", "prompt"))
    concept = gain(runs, "sae", "prompt", 0)
    sites = {
        str(one.site): gain(runs, "sae", "random", within=f"{one.site}/") for one in result.labelled[0].labels.sites
    }
    above = [one is not None and (one.low or 0.0) > 0 for one in sites.values()]
    return [
        Claim(
            "SAE latents that the pipeline selects and labels steer far better than random ones (Gemma-2-9B: about 0.5 "
            "against 0.14 to 0.19; Figure 2)",
            f"{runs[0].judged.judge}: {_ratings(runs)}. Labelled less random latents, the same labels: "
            f"{bounded(random)}; their concept's rating: {bounded(gain(runs, 'sae', 'random', 0))}",
            _above(random, 1),
        ),
        Claim("they steer about as well as LoRA (0.58 to 0.60; Figure 2)",
              f"labelled latents less LoRA: {bounded(lora)}", _same(lora)),
        Claim("prompting stays ahead (1.07; Figure 2)", f"labelled latents less the prompt: {bounded(prompt)}",
              _above(prompt, -1)),
        Claim(
            "in the concept's rating alone the gap to prompting is mostly closed (Figure 6)",
            f"labelled latents less the prompt: {bounded(concept)}",
            "not measured" if concept is None else "as claimed" if concept.value > -2 * _CLOSE else "not as claimed",
        ),
        Claim(
            "the pipeline steers at layer 17, which it was not tuned on, as at layer 32",
            "labelled less random latents: " + "; ".join(f"{site} {bounded(one)}" for site, one in sites.items()),
            "as claimed" if all(above) else "partly" if any(above) else "not as claimed",
        ),
    ]  # fmt: skip


def _ratings(runs: Sequence[Steered]) -> str:
    """Every method's rating."""
    methods = dict.fromkeys(score.method for run in runs for score in run.judged.scores)
    return ", ".join(f"{method} {bounded(mean([one for run in runs for one in run.of(method)]))}" for method in methods)


def rated(result: LabelledSteering, saes: str, f1: F1 = "calibrated") -> list[Rated]:
    """The labelled latents of a set of SAEs, of all corpora."""
    return [one for run in result.pairs(saes, f1) for one in run.of("sae")]


def _ablations(result: LabelledSteering) -> list[Claim]:
    low, high, ordinary = rated(result, LOW), rated(result, HIGH), rated(result, LOW, "ordinary")
    sparsity, plain = between(low, high), between(low, ordinary)
    selected = [one for run in result.pairs(LOW) for one in run.judged.selection if one.score == "output score"]
    gains = [one.rating.value - one.others.value for one in selected if one.rating and one.others]
    modest = bool(gains) and 0 < float(np.mean(gains)) < _MODEST
    halves = "; ".join(
        f"the better half by it {bounded(one.rating)}, the others {bounded(one.others)}" for one in selected
    )
    random = {name: bounded(gain(result.pairs(name), "sae", "random")) for name in (LOW, HIGH)}
    return [
        Claim(
            "SAEs of low and of high L0 steer about as well (Figures 7 and 8)",
            f"{LOW} {bounded(mean(low))}, {HIGH} {bounded(mean(high))}; labels that both have, low less high: "
            f"{bounded(sparsity)}; above random latents: {random[LOW]} and {random[HIGH]}",
            _same(sparsity),
        ),
        Claim("selection by output score helps modestly (Figures 7 and 8)", halves,
              "not measured" if not gains else "as claimed" if modest else "not as claimed"),
        Claim(
            "pairs by ordinary F1 steer well too where labels have support 50 (appendix E)",
            f"calibrated {bounded(mean(low))}, ordinary {bounded(mean(ordinary))}; labels that both have: "
            f"{bounded(plain)}",
            _same(plain),
        ),
    ]  # fmt: skip


def sources(result: LabelledSteering) -> Mapping[str, Mapping[str, Sequence[Rated]]]:
    """The pairs of each forum, or source of labels, by method."""
    found: dict[str, dict[str, list[Rated]]] = {}
    for run in result.pairs(LOW):
        for one in run.judged.rated:
            source = result.origin.get(one.concept, run.corpus)
            found.setdefault(source, {}).setdefault(one.method, []).append(one)
    return found


def _simulated(result: LabelledSteering) -> Claim:
    curve, ordinary = result.simulation.recovered, result.simulation.recovered_ordinary
    low, flat = curve.y[3] or 0.0, curve.y[-1] or 0.0
    return Claim(
        "a low reference prior finds better pairs than a flat one: it punishes probes that fire too often and asks for "
        "classes further apart (appendix A, Figures 3 and 4)",
        f"of pairs planted among wider and narrower latents {100 * low:.0f} % are found at a reference prior of "
        f"{curve.x[3]:.1g}, {100 * flat:.0f} % at {curve.x[-1]:.2f}, {100 * ordinary:.0f} % by ordinary F1; figures "
        "are drawn below",
        "as claimed" if low > flat and low >= ordinary else "not as claimed",
    )


def _labels(result: LabelledSteering) -> list[Claim]:
    main = [one.labels for one in result.labelled if (one.saes, one.f1) == (LOW, "calibrated")]
    lives = "; ".join(
        f"{one.site}: {'n/a' if one.share is None else f'{100 * one.share:.0f} %'} of {one.labels}"
        for one in result.survival
    )
    heldout = "; ".join(
        f"{site.site}: AUROC {bounded(site.auroc, 3)}, labels shuffled {bounded(site.shuffled_auroc, 3)}, "
        f"{site.above_half} of {len(site.pairs)} above 0.5 by their own interval"
        for one in main
        for site in one.sites
    )
    supports = "; ".join(
        f"{one.supported:,} of {one.labels:,} on enough of {one.chosen_on.texts:,} texts" for one in main
    )
    return [
        Claim("(not in the paper) labels hold on texts that they were not chosen on", heldout, "no claim"),
        Claim("(not in the paper) labels of one SAE's latents are told by another seed's too", lives, "no claim"),
        Claim("labels differ in support by orders of magnitude (Figure 5)", f"labels {supports}", "not measured"),
    ]


def _above(difference: Interval | None, sign: int) -> Verdict:
    """Whether a difference has this sign: by its interval, by its value alone, or not."""
    if difference is None or difference.low is None or difference.high is None:
        return "not measured"
    bound = difference.low if sign > 0 else -difference.high
    return "as claimed" if bound > 0 else "partly" if sign * difference.value > 0 else "not as claimed"


def _same(difference: Interval | None) -> Verdict:
    """Whether two are about as good: a small difference; "partly" where a large one may be chance."""
    if difference is None:
        return "not measured"
    if abs(difference.value) <= _CLOSE:
        return "as claimed"
    clear = difference.low is None or difference.high is None or difference.low > 0 or difference.high < 0
    return "not as claimed" if clear else "partly"


def _by_concept(rated: Sequence[Rated]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for one in rated:
        if one.rating is not None:
            values.setdefault(one.concept, []).append(one.rating)
    return {name: float(np.mean(several)) for name, several in values.items()}


def _value(one: Rated, part: int | None) -> float:
    value = one.rating if part is None else one.parts[part]
    return float("nan") if value is None else value
