"""The commands that are stages. Methods and papers bring them; nothing here knows one of them."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

from unweave.core.command import Command
from unweave.methods import commands
from unweave.papers import PAPERS

GROUPS = {
    "circuit": "Find the circuits of a model's behaviours in latents, check them, draw them and change them.",
    "finetune": "Choose latents, and fine-tune a model while they are ablated, so that it learns without them.",
    "compress": "Prune, round or factor a model's weights, or an SAE's, and measure what that costs.",
    "paper": "Run a paper's recipe: its trainings, measurements, table and figures, beside what it claims.",
}
"""Commands that hold others, with their help."""


@lru_cache
def stages() -> dict[str, Command]:
    """{words: command}, in the order of help."""
    recipes = (import_module(f"unweave.{name}.spec").COMMAND for name in PAPERS)
    return {command.words: command for command in (*commands(), *recipes)}


def __getattr__(name: str) -> Any:
    """``unweave.cli.stages:command_circuit_find`` builds that command; the command line asks for it by this name."""
    written = name.removeprefix("command_")
    known = {words.replace(" ", "_").replace("-", "_"): command for words, command in stages().items()}
    if written == name or written not in known:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from unweave.cli.bridge import stage_command

    return stage_command(known[written])
