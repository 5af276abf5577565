"""The paper's claims beside what was measured here."""

from __future__ import annotations

from collections.abc import Sequence

from unweave.methods.explain.rubric.result import Scores
from unweave.methods.special_tokens.view import finding
from unweave.papers.claims import Claim, Verdict
from unweave.papers.instruct_saes.compare import Contest, cells, contest
from unweave.papers.instruct_saes.figures import measure_name
from unweave.papers.instruct_saes.result import RECIPES, InstructSaes, Measure, Rated, Recipe

_ENOUGH_RATED = 30
"""latents per recipe below which shares of scores are not compared"""


def contests(result: InstructSaes, measure: Measure) -> list[tuple[Recipe, Contest]]:
    """FAST against each of the other recipes."""
    every = cells(result.saes, measure, result.k)
    return [(other, contest(every, "FAST", other)) for other in RECIPES[:2]]


def words(c: Contest) -> str:
    """`lower in 5 of 6 cells (4 by every seed; 0 higher by every seed), 0.31 lower on average`."""
    if not c.cells:
        return "nothing to compare"
    by = f"{abs(c.mean_difference):.2f} {'lower' if c.mean_difference < 0 else 'higher'} on average"
    rest = f"; {c.left_out} not comparable" if c.left_out else ""
    seeds = f"{c.clearly} by every seed; {c.clearly_higher} higher by every seed"
    return f"lower in {c.lower} of {c.cells} cells ({seeds}), {by}{rest}"


def claims(result: InstructSaes) -> list[Claim]:
    """Every claim of the paper, and three more that stand beside it."""
    basis = "at equal coefficients, whatever the L0" if result.k is None else f"all at L0 {result.k}"

    def measured(measure: Measure) -> tuple[str, Verdict]:
        against = contests(result, measure)
        text = "; ".join(f"against {other}: {words(contest)}" for other, contest in against)
        return f"FAST's {measure_name(measure)}, {basis}: {text}", _verdict([contest for _, contest in against])

    return [
        Claim(
            "FAST reconstructs all tokens better than both block trainings in most settings (Llama-3.2-3B, layer 20, "
            "Standard, 8x: log2 MSE -0.953 against -0.693 BT(P) and -0.919 BT(F))",
            *measured(Measure("all")),
        ),
        Claim(
            "FAST reconstructs special tokens far better (Qwen2.5-7B, layer 18: Standard 0.647 against 5.199 and "
            "1.509, JumpReLU -9.760 against -4.001 and -8.074)",
            *measured(Measure("special")),
        ),
        Claim("(not in the paper) the same without norm outliers", *measured(Measure("all", outliers=False))),
        Claim("(not in the paper) special tokens without norm outliers", *measured(Measure("special", outliers=False))),
        Claim("(not in the paper) the assistant's own words", *measured(Measure("assistant"))),
        rating_claim(result.ratings),
        Claim(
            "steering with latents of special tokens improves answers within a range of coefficients, and degrades "
            "them beyond it",
            # Whether answers get better was not measured, so there is no other verdict.
            finding(result.special_tokens.steering),
            "not measured",
        ),
    ]


def _verdict(against: Sequence[Contest]) -> Verdict:
    """As claimed: lower in most cells against every other recipe, and nowhere clearly higher."""
    if not all(c.cells for c in against):
        return "not measured"
    if all(c.lower > c.cells / 2 and c.clearly_higher == 0 for c in against):
        return "as claimed"
    return "not as claimed" if all(c.lower <= c.cells / 2 for c in against) else "partly"


def rating_claim(ratings: Sequence[Rated]) -> Claim:
    """Whether more of FAST's latents are rated 4 or 5; no verdict from few latents, or a judge that does not read."""
    claim = "more of FAST's latents are rated 4 or 5 (Llama-3.2-3B, 8x: 21.1 % against 7.0 % BT(P) and 10.2 % BT(F))"
    if not ratings:
        return Claim(claim, "", "not measured")
    rubrics = {rated.recipe: rated.rubric for rated in ratings}
    scored = ", ".join(f"{recipe} {_share(rubric.real)}" for recipe, rubric in rubrics.items())
    controls = ", ".join(
        f"{recipe} {rubric.shuffled.mean.value:.1f} against {rubric.real.mean.value:.1f}"
        for recipe, rubric in rubrics.items()
        if rubric.shuffled and rubric.shuffled.mean and rubric.real.mean
    )
    judge = ratings[0].rubric.judge.model
    ours = f"{judge}: {scored}. Mean score of shuffled against real contexts: {controls}."
    fewest = min(rubric.real.scored for rubric in rubrics.values())
    unread = [name for name, rubric in rubrics.items() if not (rubric.above_shuffled and rubric.above_shuffled.shown)]
    reasons = [f"{fewest} latents are too few for a verdict"] if fewest < _ENOUGH_RATED else []
    if unread:
        reasons.append(f"the judge was not shown to tell latents from shuffled contexts ({', '.join(unread)})")
    if reasons:
        return Claim(claim, f"{ours} {'; '.join(reasons)}.", "not measured")
    high = {recipe: rubric.real.high.value for recipe, rubric in rubrics.items() if rubric.real.high is not None}
    best = all(high["FAST"] > high[other] for other in RECIPES[:2])
    return Claim(claim, ours, "as claimed" if best else "not as claimed")


def _share(scores: Scores) -> str:
    return f"{100 * scores.high.value:.0f} % of {scores.scored}" if scores.high else "none scored"
