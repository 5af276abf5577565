"""``unweave convert``: any SAE that can be read, written as another tool's files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from unweave.cli.output import JSON
from unweave.core.errors import UnweaveError
from unweave.core.shown import plain

HELP = (
    "Write a trained SAE as another tool's files.\n\n"
    "Reads a folder or file in any known format, hub:org/name[@revision][/sub/folder], or saelens:RELEASE/ID; the "
    "format is found from the content. What was written is read again and compared. A format that cannot say what the "
    "SAE does is refused, with the reason. The other commands read all of these formats by themselves.\n\n"
    "For example:\n\n"
    "    unweave convert runs/train-0123456789ab/sae --to sparsify --out layers.9\n"
    "    unweave convert hub:org/name/layer_3 --to saelens\n"
    "    unweave convert ae.pt --to unweave --site resid_post.3 --out my-sae"
)

_SAE = Parameter(help="A folder, a file, hub:org/name/path, or saelens:RELEASE/ID.")
_TO = Parameter(help="Whose files to write.")
_OUT = Parameter(help="The folder to write; by default the SAE's own name with the format.")
_SITE = Parameter(help="Where it reads, e.g. resid_post.9, when its file does not say or says it wrongly.")
_WRITE = Parameter(help="Where a transcoder writes, e.g. mlp_add.9; with --site.")

_TOLERANCE = 1e-3

Target = Literal["unweave", "saelens", "dictionary_learning", "sparsify"]


def convert(
    sae: Annotated[str, _SAE],
    /,
    *,
    to: Annotated[Target, _TO],
    out: Annotated[Path | None, _OUT] = None,
    site: Annotated[str | None, _SITE] = None,
    write: Annotated[str | None, _WRITE] = None,
    json: Annotated[bool, JSON] = False,
) -> dict[str, Any] | None:
    """Reads an SAE, writes it in another format, reads that again and compares."""
    import unweave

    if write is not None and site is None:
        raise UnweaveError("--write says where a transcoder writes, but not where it reads", remedy="add --site")
    folder = out or Path(f"{Path(sae.rstrip('/')).name.removesuffix('.safetensors')}-{to}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UnweaveError("this place is taken", where=str(folder), remedy="name another folder with --out")
    loaded = unweave.SAE.load(sae)
    if site is not None:
        loaded.at(site, write)
    difference = _write(loaded, folder, to)
    facts = {
        "sae": str(folder),
        "format": to,
        "kind": loaded.kind,
        "latents": loaded.d_sae,
        "reads": None if loaded.read is None else str(loaded.read),
        "writes": None if loaded.write is None else str(loaded.write),
        "difference": difference,
    }
    if json:
        return facts
    print(plain(f"{loaded}; read again, its reconstructions differ by {difference:.1e}"))
    if loaded.read is None:
        print("its file names no site that is known: say where it belongs with --site")
    print(plain(f"SAE folder ({to}): {folder}"))
    return None


def _write(sae: Any, folder: Path, to: Target) -> float:
    """Writes the SAE and returns how far what was written is from it; nothing is left there if that is too far.

    It is written inside the folder under another name, and gets its place when it was read again.
    """
    import unweave

    new, temporary = not folder.exists(), folder / f".unfinished.{os.getpid()}"
    try:
        sae.save(temporary, to)
        difference = _difference(sae, unweave.SAE.load(temporary))
        for path in sorted(temporary.iterdir(), key=lambda path: path.suffix == ".json"):  # weights first
            os.replace(path, folder / path.name)
        temporary.rmdir()
    except BaseException:
        shutil.rmtree(folder if new else temporary, ignore_errors=True)
        raise
    return difference


def _difference(before: Any, after: Any) -> float:
    """How far the reconstructions of two SAEs are apart on random inputs, relative to their size."""
    import torch

    x = torch.randn(64, before.d_in, generator=torch.Generator().manual_seed(0)) * 3
    y, again = before(x).double(), after(x).double()
    difference = float((again - y).norm() / y.norm().clamp(min=1e-30))
    if not difference <= _TOLERANCE:
        what = f"what was written gives other reconstructions: they differ by {difference:.2%}"
        raise UnweaveError(what, remedy="half precision cannot hold it; load it, sae.float(), and save it again")
    return round(difference, 9)
