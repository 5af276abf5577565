"""Edits inside other people's training loops: Hugging Face's Trainer, TRL's trainers, or a loop of one's own.

    lm = lm_of(model)                                   # once, while the model is still the SAE's
    trainer = Trainer(model, args, callbacks=[EditCallback(lm, condition.edits)], ...)

    with ablating(lm, sae.ablate(latents)):             # around the forward and the backward pass
        model(**batch).loss.backward()

The callback edits while a step is computed and lifts the edits while the trainer evaluates, so that what it reports is
of the model as it will be deployed. What it saves are ordinary weights: hooks are not part of them. The condition
``penalty`` needs the loss, which a callback does not see; use ``finetune`` for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers.trainer_callback import TrainerCallback

from unweave.lm.model import LM
from unweave.lm.taps import Edits, SiteEdit


def lm_of(model: nn.Module, tokenizer: Any = None) -> LM:
    """An LM around a Hugging Face causal model, or the PeftModel of one, which stays in training mode if it is, with
    the same parameters trainable. SAEs are compared with its weights when they first edit, and then no more."""
    base: Any = getattr(model, "get_base_model", lambda: model)()
    training = [(module, module.training) for module in base.modules()]
    trainable = [(weight, weight.requires_grad) for weight in base.parameters()]
    lm = LM(base, tokenizer)
    for module, mode in training:
        module.training = mode
    for weight, flag in trainable:
        weight.requires_grad_(flag)
    return lm


@contextmanager
def ablating(model: LM | nn.Module, edits: Edits) -> Iterator[None]:
    """Edits every forward pass of the model in the ``with`` block, which must hold the backward passes as well.

    Every pass is one of whole rows, none the continuation of a generation.
    """
    lm = model if isinstance(model, LM) else lm_of(model)
    with lm.taps(edit=edits, grad=True):
        session = lm.sessions[-1]

        def anew(_module: Any, _args: Any) -> None:
            session.step = -1

        handle = lm.model.register_forward_pre_hook(anew, prepend=True)
        try:
            yield
        finally:
            handle.remove()


class EditCallback(TrainerCallback):
    """Edits a model in the steps of a trainer. ``edits``: the same in every step, or those of a training's progress
    (0: the first step, 1: the last), as ``Condition.edits``."""

    def __init__(self, model: LM | nn.Module, edits: Edits | Callable[[float], Edits]) -> None:
        self.lm = model if isinstance(model, LM) else lm_of(model)
        self.edits = edits
        self._open = ExitStack()
        with ablating(self.lm, self.at(0.0)):  # refuses an SAE of another model, before training
            pass

    def at(self, progress: float) -> Edits:
        """The edits at a training's progress."""
        varies = callable(self.edits) and not isinstance(self.edits, SiteEdit)
        edits: Any = self.edits
        return edits(progress) if varies else edits

    def _begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        self.close()
        edits = self.at(min(1.0, state.global_step / max(1, state.max_steps - 1)))
        self._open.enter_context(ablating(self.lm, edits))

    def _end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, state, control
        self.close()

    on_step_begin, on_step_end = _begin, _end

    def close(self) -> None:
        """Lifts the edits of a step that was interrupted."""
        self._open.close()
