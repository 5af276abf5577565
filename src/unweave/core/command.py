"""A command: its name, its help, and the module of its stage. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from unweave.core.result import Result
from unweave.core.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of the command line. It stands as COMMAND in a method's ``spec.py``."""

    words: str
    """what is typed after ``unweave``: "train", "circuit find" """
    spec: type[Spec]
    result: type[Result]
    stage: str
    """``module:name`` of the stage"""
    summary: str
    about: str
    examples: tuple[str, ...]
    positional: str = ""
    """the list of the Spec that words without an option fill"""
    in_several: bool = False
    """whether torchrun can start it in several processes"""

    @property
    def name(self) -> str:
        """What its runs are called: "circuit-find"."""
        return self.words.replace(" ", "-")

    @property
    def group(self) -> str:
        """The command that it stands under; empty for none."""
        return self.words.rpartition(" ")[0]

    @property
    def help(self) -> str:
        """What the command does, how files and options go together, and examples."""
        examples = "\n".join(f"    {line}" for line in self.examples)
        return (
            f"{self.summary}\n\n{self.about}\n\n"
            "Fields come from their defaults, then the YAML or TOML file, then the options. A dotted option is a field "
            "inside a group: --data.seed 1 stands for data: {seed: 1} in the file. The run directory is "
            "printed; asking the same again reuses it.\n\n"
            f"For example:\n\n{examples}"  # a heading "Examples:" would be read as a docstring section, and dropped
        )

    def run(self, spec: Spec, runs: Path) -> Any:
        """The run of its stage; see ``core.stage``."""
        module, _, name = self.stage.partition(":")
        return getattr(import_module(module), name)(spec, runs)
