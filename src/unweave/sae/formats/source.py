"""Where an SAE's files are, and what can be known of them without reading the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from unweave.core.fields import Fields
from unweave.core.files import files_under, read_json, read_yaml
from unweave.sae.formats.headers import tensor_names

WEIGHTS = (".safetensors", ".npz", ".pt", ".pth")
"""how files of weights end"""
_CONFIGS = (".json", ".yaml", ".yml")
_CONFIG_BYTES = 1 << 24
"""configurations have a few kB; ours may hold a model's fingerprint and the settings of its training"""


@dataclass(frozen=True)
class Source:
    """A folder or a file on this machine, and the name it was asked for by."""

    path: Path
    origin: str
    """what the user wrote; names inside a hub repository are kept, for some formats say their site only there"""
    facts: dict[str, str] = field(default_factory=dict)
    """e.g. the hub repository's revision"""

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def file(self, name: str) -> Path | None:
        """The weights file ``name``: in the folder, or the file itself if it is called that. None without one."""
        if self.path.is_file():
            return self.path if self.path.name == name.rsplit("/", 1)[-1] else None
        return self.folder / name if (self.folder / name).is_file() else None

    def the_file(self, suffix: str) -> Path | None:
        """The file itself if it ends so; None for folders and other files."""
        return self.path if self.path.is_file() and self.path.name.endswith(suffix) else None

    def config(self, *names: str) -> Fields:
        """The first of these JSON or YAML files beside the weights, or none. UnweaveError for damaged ones."""
        for name in names:
            path = self.folder / name
            if path.is_file():
                values = read_yaml(path) if path.suffix in (".yaml", ".yml") else read_json(path, at_most=_CONFIG_BYTES)
                return Fields(values, str(path))
        return Fields({}, str(self.folder))

    def files(self) -> list[Path]:
        """Everything that may be read of it: weights and configurations, in order."""
        if self.path.is_dir():
            return [path for path in files_under(self.path) if path.suffix in (*WEIGHTS, *_CONFIGS)]
        beside = (path for path in self.folder.iterdir() if path.suffix in _CONFIGS and path.is_file())
        return [self.path, *sorted(path for path in beside if path != self.path)]

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the tensors in the file, when a safetensors or npz file itself was named; else none."""
        if self.path.is_dir():
            return frozenset()
        return tensor_names(self.path)

    @property
    def hint(self) -> str:
        """Every name on the way to the file, for formats that say layer and kind only there."""
        return f"{self.origin}/{self.path.as_posix()}"
