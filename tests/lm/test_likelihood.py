"""Likelihoods after a prompt that is read once, against whole passes of single rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from unweave.core.errors import UnweaveError
from unweave.lm import likelihood
from unweave.lm.likelihood import mean_log_probs
from unweave.lm.model import LM

PROMPT = [40, 41, 42, 43, 44, 45, 46, 47, 48, 49]  # longer than gemma's windows of 8
ANSWERS = [[60, 61, 62], [], [70], [50, 51, 52, 53, 54, 55, 56, 57, 58], [60, 61, 62]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "gemma3_text", "dynamic"])
@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1]])
def test_an_answers_likelihood_is_that_of_its_tokens_behind_the_prompt(
    tiny: Callable[..., Any], family: str, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama" if family == "dynamic" else family)
    if family == "dynamic":  # frequencies change beyond 12 positions: nothing can be kept
        model.config.max_position_embeddings = 12
        model.config.rope_parameters = {"rope_theta": 10_000.0, "rope_type": "dynamic", "factor": 4.0}
        state = model.state_dict()
        model = type(model)(model.config).eval()
        model.load_state_dict(state)
    lm = LM(model, None)
    monkeypatch.setattr(likelihood, "_LOGITS", lm.vocab_size * 18)  # two rows of nine tokens
    for answer, mean in zip(ANSWERS, mean_log_probs(lm, prompt, ANSWERS), strict=True):
        logits = torch.log_softmax(lm(torch.tensor([prompt + answer]))[0].double(), -1)
        each = [float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(answer)]
        assert mean == pytest.approx(sum(each) / len(each), abs=1e-5) if each else mean != mean


def test_an_answer_without_room_is_refused(tiny: Callable[..., Any]) -> None:
    with pytest.raises(UnweaveError):
        mean_log_probs(LM(tiny("gpt2"), None), PROMPT, [[60] * 60])
