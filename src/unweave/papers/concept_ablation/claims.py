"""What the paper claims, beside what came out here. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from unweave.papers.claims import Claim, Verdict
from unweave.papers.concept_ablation.result import LEARNT, ConceptAblation, Name, Spread, Task

CHANCE = 0.5
_VALID = 0.95
_UNMEASURED = (
    ("latents chosen by explanations do about as well as latents chosen by hand (Figure 2, right; appendix E)",
     "here a rule chooses; `unweave finetune select` also takes queries, labels and a file marked by hand"),
    ("a query by embeddings hardly tells gendered from pronoun latents (appendix E)",
     "`unweave finetune select --by query` with --query.by embedding and judge compares them"),
    ("explanations pass at a simulation score above 0.5 (appendix C)",
     "`unweave explain` scores explanations; `--scale paper` asks a chat model for relevance instead"),
    ("fading ablations out in training could close the gap to ablation at test (future work)",
     "`unweave finetune run --condition.kind zero --condition.fade out`"),
)  # fmt: skip


def doubles(result: ConceptAblation) -> list[Task]:
    """The combinations whose cue plain fine-tuning learnt."""
    return [task for task in result.tasks if task.name != "gender" and task.misled]


def improved(task: Task) -> bool:
    """Whether zeroing chosen latents gains over plain fine-tuning, by the interval of the paired difference."""
    gain = task.gain("zero", "none")
    return gain is not None and (gain.mean if gain.interval is None else gain.interval[0]) > 0


def claims(result: ConceptAblation) -> list[Claim]:
    """Every claim, figure and table of the paper with our figure and a verdict."""
    gender = next(task for task in result.tasks if task.name == "gender")
    rows = [*_gender(gender), *_doubles(result), *_latents(result), *_both(result)]
    return rows + [Claim(claim, ours, "not measured") for claim, ours in _UNMEASURED]


def words(spread: Spread | None) -> str:
    """ "65.5 ± 2.1 %" """
    return "n/a" if spread is None else f"{spread.words()} %"


def _accuracies(task: Task, names: Sequence[Name], split: str = "ood") -> str:
    return "; ".join(
        f"{name} {words(task.spread(name, split))} (among all tokens {words(task.spread(name, split, 'all'))})"
        for name in names
    )


def _is(value: Spread | None, true: Callable[[float], bool]) -> Verdict:
    return "not measured" if value is None else "as claimed" if true(value.mean) else "not as claimed"


def _above(gain: Spread | None) -> Verdict:
    """Whether a gain is above 0: by its interval, by its mean alone, or not."""
    if gain is None:
        return "not measured"
    low = None if gain.interval is None else gain.interval[0]
    return "as claimed" if low is not None and low > 0 else "partly" if gain.mean > 0 else "not as claimed"


def _gender(task: Task) -> list[Claim]:
    gain, random = task.gain("zero", "none"), task.gain("zero", "random")
    return [
        Claim("gender: plain fine-tuning is perfect on validation and has 8 % out of distribution",
              f"validation {_accuracies(task, ['none'], 'validation')}; out of distribution "
              f"{_accuracies(task, ['none'])}",
              _is(task.spread("none", "ood"), lambda value: value < CHANCE)),
        Claim("gender: with unintended latents zeroed 95.6 % on validation, 65.5 % out of distribution (Figure 2)",
              f"validation {_accuracies(task, ['zero'], 'validation')}; out of distribution "
              f"{_accuracies(task, ['zero', 'mean', 'span'])}; zeroed less plain {words(gain)}", _above(gain)),
        Claim("random latents of the same top 100 do not help, though single seeds may (Figure 2)",
              f"{_accuracies(task, ['random'])}; chosen less random {words(random)}", _above(random)),
        Claim("trained on the distribution of the test, 99.1 % (Table 2)", _accuracies(task, ["skyline"]),
              _is(task.spread("skyline", "ood"), lambda value: value > _VALID)),
        Claim("(not in the paper) a penalty on the latents, an inoculating line",
              _accuracies(task, ["penalty", "inoculate"]), "no claim"),
    ]  # fmt: skip


def _each(tasks: Sequence[Task], name: Name, split: str = "ood") -> str:
    return "; ".join(f"{task.name} {words(task.spread(name, split))}" for task in tasks) or "none is left"


def _doubles(result: ConceptAblation) -> list[Claim]:
    every, left = [task for task in result.tasks if task.name != "gender"], doubles(result)
    valid = [spread.mean for task in every if (spread := task.spread("none", "validation")) is not None]
    better = [task.name for task in left if improved(task)]
    skyline = [spread.mean for task in left if (spread := task.spread("skyline", "ood")) is not None]
    share = len(better) / len(left) if left else None
    return [
        Claim("double multiple choice: at least 97 % on validation in all 24 combinations",
              _each(every, "none", "validation"),
              "not measured" if not valid else "as claimed" if min(valid) >= _VALID else "partly"),
        Claim("16 of 24 combinations have less than 90 % on the intended question out of distribution",
              f"{len(left)} of {len(every)} below {100 * LEARNT:.0f} %: {_each(every, 'none')}",
              "not measured" if len(every) < 24 else "as claimed" if len(left) >= 16 else "partly"),
        Claim("zeroing chosen latents improves 10 of these 16 (Figure 2)",
              f"{len(better)} of {len(left)} ({', '.join(better) or 'none'}): {_each(left, 'zero')}",
              "not measured" if share is None else "as claimed" if share >= CHANCE else "partly" if share else
              "not as claimed"),
        Claim("random ablations of them are ineffective or differ from seed to seed (Figure 2)", _each(left, "random"),
              _wins(left, "zero", "random")),
        Claim("trained on the distribution of the test, 94.2 to 100 % (Table 1)", _each(left, "skyline"),
              "not measured" if not skyline else "as claimed" if min(skyline) > CHANCE + 0.4 else "partly"),
    ]  # fmt: skip


def _wins(tasks: Sequence[Task], one: Name, other: Name) -> Verdict:
    """Whether one condition does better in all tasks, in some, or in none."""
    gains = [gain.mean > 0 for task in tasks if (gain := task.gain(one, other)) is not None]
    return "not measured" if not gains else "as claimed" if all(gains) else "partly" if any(gains) else "not as claimed"


def _latents(result: ConceptAblation) -> list[Claim]:
    counts = ", ".join(f"{task.name} {task.chosen} of {task.candidates}" for task in result.tasks)
    early = []
    for task in result.tasks:
        half = len(task.sites) // 2
        first, last = (sum(one.chosen_total for one in part) for part in (task.sites[:half], task.sites[half:]))
        early.append(first > last)
    return [
        Claim("of the 100 latents with the largest effects 6 are unintended for gender, 2 to 27 for the others",
              counts, "as claimed" if all(task.chosen <= 30 for task in result.tasks) else "partly"),
        Claim("effects of chosen latents are largest in early layers (Figure 3)",
              f"more in the lower half of the sites in {sum(early)} of {len(early)} tasks; the figure is below",
              "as claimed" if all(early) else "partly" if any(early) else "not as claimed"),
    ]  # fmt: skip


def _both(result: ConceptAblation) -> list[Claim]:
    tasks = [task for task in result.tasks if task.misled]
    names: tuple[Name, ...] = ("zero", "test", "both")
    ours = "; ".join(
        f"{task.name} " + ", ".join(f"{name} {words(task.spread(name, 'ood'))}" for name in names) for task in tasks
    )
    low = [task.name for task in tasks if (one := task.spread("both", "validation")) and one.mean < _VALID]
    return [
        Claim("ablation at test alone does worse than in training (Figure 6, appendix F)", ours or "no task is left",
              _wins(tasks, "zero", "test")),
        Claim("ablation in training and at test has the highest accuracy (Figure 6)", ours or "no task is left",
              _wins(tasks, "both", "zero")),
        Claim("and sometimes breaks validation", f"below {100 * _VALID:.0f} %: {', '.join(low) or 'none'}",
              "not measured" if not tasks else "as claimed" if low else "not as claimed"),
    ]  # fmt: skip
