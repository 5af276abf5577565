"""What explaining would take, counted on the prompts themselves before anything is asked."""

from __future__ import annotations

from collections.abc import Sequence

from unweave.judge.base import Conversation
from unweave.judge.check import known_texts
from unweave.methods.explain.examples import Examples
from unweave.methods.explain.forms import DETECTION, EXPLAIN, RELEVANCE, Claim
from unweave.methods.explain.result import Estimate
from unweave.methods.explain.scores import CLAIMS, claims, simulations
from unweave.methods.explain.simulate import SIMULATION

_STAND_IN = "words such as these that say what tokens or texts have in common"
_REPLY = {"explain": 40, "detection": 10, "fuzzing": 10, "rubric": 50, "relevance": 10}
"""tokens of a usual reply; of a simulation about four for each of its tokens, where the judge writes it"""
_RUBRIC = 800
"""tokens of the rubric's prompts"""
_BYTES = 4


def estimate(
    examples: Sequence[Examples], scores: Sequence[str], *, explained: bool = False, relevance: bool = False,
    checked: bool = True, reads: bool = False, prices: tuple[float | None, float | None] = (None, None),
) -> Estimate:  # fmt: skip
    """Prompts and tokens of everything that would be asked; see ``Estimate``. ``explained``: explanations are there
    already; ``relevance``: the judge rates it; ``reads``: the judge scores given text."""
    prompts = total = new = 0
    for one in examples:
        kinds: list[tuple[str, Conversation]] = [] if explained else [("explain", EXPLAIN.messages(one))]
        for name in scores:
            if name in CLAIMS:
                asked = [CLAIMS[name].messages(claim) for claim, _ in claims(name, one, _STAND_IN)]
            elif name == "simulation":
                asked = [SIMULATION.messages(case) for case, _ in simulations(one, _STAND_IN)]
            else:
                asked = []
            kinds += [(name, conversation) for conversation in asked * 2]
        if relevance:
            kinds.append(("relevance", RELEVANCE.messages(Claim(_STAND_IN, _STAND_IN))))
        prompts += len(kinds) + 2 * ("rubric" in scores)
        total += sum(_tokens(conversation) for _, conversation in kinds) + 2 * _RUBRIC * ("rubric" in scores)
        simulated = 0 if reads else 4 * max(len(context.ids) for context in one.active)
        new += sum(_REPLY.get(name, simulated) for name, _ in kinds) + 2 * _REPLY["rubric"] * ("rubric" in scores)
    per_latent = (total + new) // max(1, len(examples))
    if checked:
        cases = [DETECTION.messages(Claim(one.concept, one.text)) for one in known_texts()]
        prompts, total, new = prompts + len(cases), total + sum(map(_tokens, cases)), new + 10 * len(cases)
    price = None if None in prices else (total * prices[0] + new * prices[1]) / 1e6  # type: ignore[operator]
    return Estimate(prompts, total, new, price, per_latent)


def _tokens(conversation: Conversation) -> int:
    return sum(8 + len(message["content"].encode()) // _BYTES for message in conversation)
