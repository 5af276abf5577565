"""Which of the published Gemma Scope SAEs a paper means."""

from __future__ import annotations

import re
from collections.abc import Sequence

from unweave.core.errors import UnweaveError


def nearest_l0(files: Sequence[str], width: str, l0: int) -> dict[int, str]:
    """Each layer's folder with the L0 nearest to ``l0``, of files named layer_3/width_16k/average_l0_59/params.npz."""
    nearest: dict[int, tuple[int, str]] = {}
    for file in files:
        match = re.fullmatch(rf"(layer_(\d+)/width_{width}/average_l0_(\d+))/params\.npz", file)
        if match is None:
            continue
        layer, distance = int(match[2]), abs(int(match[3]) - l0)
        if layer not in nearest or (distance, match[1]) < nearest[layer]:
            nearest[layer] = (distance, match[1])
    if not nearest:
        raise UnweaveError(f"the repository lists no SAE of width {width}", remedy="check the name and the network")
    return {layer: folder for layer, (_, folder) in sorted(nearest.items())}


def listed(repository: str) -> list[str]:
    """The files of a repository on the hub. UnweaveError where they cannot be listed."""
    import huggingface_hub

    try:
        return huggingface_hub.list_repo_files(repository)
    except Exception as error:  # network, hub and authorisation errors of several libraries meet here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnweaveError(
            f"its files cannot be listed: {reason}", where=f"hub:{repository}", remedy="check the network and try again"
        ) from error
