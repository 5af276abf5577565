"""One folder per thing a user can do, from its question to its picture.

A method is known by its name here; its ``spec.py`` has its command, and the command line, help and reports take it from
there.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module

from unweave.core.command import Command

METHODS = (
    "methods.demo",
    "methods.train",
    "methods.evaluate",
    "latents",
    "methods.labels",
    "methods.trace",
    "methods.steer",
    "methods.finetune.attribute",
    "methods.finetune.select",
    "methods.finetune",
    "methods.axbench",
    "methods.explain",
    "methods.explain.rubric",
    "methods.saebench",
    "methods.saebench.compare",
    "methods.saebench.known",
    "methods.special_tokens",
    "methods.circuits",
    "methods.shift",
    "methods.behaviours",
    "methods.compress",
    "methods.compress.transfer",
    "methods.report",
)
"""In the order of help and of pages."""


@lru_cache
def commands() -> tuple[Command, ...]:
    """Every command of every method. Imports their specs, which know no torch."""
    found: list[Command] = []
    for name in METHODS:
        module = import_module(f"unweave.{name}.spec")
        found += getattr(module, "COMMANDS", (module.COMMAND,) if hasattr(module, "COMMAND") else ())
    return tuple(found)


def command_of(stage: str) -> Command | None:
    """The command whose runs are called so; None for stages that are parts of others."""
    return next((command for command in commands() if command.name == stage), None)
