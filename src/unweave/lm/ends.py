"""At which tokens generation ends."""

from __future__ import annotations

from typing import Any

from unweave.core.errors import UnweaveError
from unweave.lm.chat import Role, has_template, render, special_ids


def end_ids(model: Any, tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """The end tokens of a model's configurations and of its tokenizer (None where there is none), and the token by
    which the chat template ends the assistant's turn; ids that the model does not have are left out."""
    ids: set[int] = set()
    for place in (model.generation_config, model.config, model.config.get_text_config(), tokenizer):
        value = getattr(place, "eos_token_id", None)
        ids |= {int(i) for i in ([] if value is None else [value] if isinstance(value, int) else value)}
    if tokenizer is not None:
        ids |= ends_of_turn(tokenizer)
    return tuple(sorted(i for i in ids if 0 <= i < vocab_size))


def ends_of_turn(tokenizer: Any) -> frozenset[int]:
    """The token that the chat template writes right behind the assistant's words; empty where it writes none."""
    if not has_template(tokenizer) or not getattr(tokenizer, "is_fast", False):
        return frozenset()
    talk = [{"role": "user", "content": "7"}, {"role": "assistant", "content": "8"}]
    try:
        ids, roles = render(tokenizer, talk)
    except UnweaveError:
        return frozenset()
    reply = [place for place, role in enumerate(roles) if role == Role.ASSISTANT]
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marks = special_ids(tokenizer) | {i for i, token in added.items() if token.content.strip()}
    behind = [i for i in ids[reply[-1] + 1 :] if i in marks] if reply else []
    return frozenset(behind[:1])
