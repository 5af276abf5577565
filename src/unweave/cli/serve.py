"""``unweave serve``: the steered model behind an address on this machine, for any client of OpenAI's."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

HELP = (
    "Serve a steered model on this machine, in OpenAI's form, so that any client can talk to it.\n\n"
    "The address is http://127.0.0.1:PORT/v1 (models, chat/completions, completions; whole or as a stream). Nothing "
    "outside this machine can reach it. --edits are in force in every answer; a request brings its own in "
    '"unweave": {"edits": [...]}. docs/steer.md has both.\n\n'
    "For example:\n\n"
    "    unweave serve --saes runs/train-0123456789ab/sae --edits '{latent: resid_post.9/1234, value: 8}'\n"
    "    unweave serve --saes runs/train-0123456789ab/sae --records runs/latents-0123456789ab"
)

_SAES = Parameter(help="SAEs whose latents can be named.", negative=(), consume_multiple=True, show_default=False)
_EDITS = Parameter(
    help="Edits of every answer: {latent: resid_post.9/123, mode: clamp, value: 8}, with where and when as in steer.",
    negative=(),
    consume_multiple=True,
    show_default=False,
)
_RECORDS = Parameter(help="A run of 'unweave latents' of these SAEs; without, edits need a value for a strength.")
_PERSIST = Parameter(help="Whether later tokens attend to what was edited: docs/steer.md.")
_MODEL = Parameter(help="The model; by default the one that the SAEs were trained on.")
_DEVICE = Parameter(help="cpu, cuda, cuda:1...; by default a GPU where there is one.")
_MISMATCH = Parameter(help="Use SAEs in a model that they were not trained on, for this reason.")
_PORT = Parameter(help="The port; 0 takes a free one.")


def serve(
    *,
    saes: Annotated[list[str], _SAES],
    edits: Annotated[list[str] | None, _EDITS] = None,
    records: Annotated[Path | None, _RECORDS] = None,
    persist: Annotated[bool, _PERSIST] = True,
    model: Annotated[str | None, _MODEL] = None,
    device: Annotated[str | None, _DEVICE] = None,
    accept_mismatch: Annotated[str | None, _MISMATCH] = None,
    port: Annotated[int, _PORT] = 8000,
) -> None:
    """Loads, says where it listens, and answers until it is interrupted."""
    import socket

    from unweave.cli.progress import show_progress
    from unweave.core.errors import UnweaveError

    if not 0 <= port <= 65535:
        raise UnweaveError(
            f"{port} is no port", where="--port", remedy="choose one from 1 to 65535, or 0 for a free one"
        )
    asked = [_edit(word) for word in edits or ()]
    try:
        import uvicorn

        from unweave.methods.steer.server import app
    except ModuleNotFoundError as error:
        raise UnweaveError(
            f"serving needs a library that is not installed: {error.name}", remedy="pip install 'unweave[web]'"
        ) from None
    try:
        listening = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise UnweaveError(
            f"cannot listen on port {port}: {error}", where="--port", remedy="choose another, or 0 for a free one"
        ) from None
    with listening:
        with show_progress(False):
            steered = _opened(saes, asked, records, persist, model, device, accept_mismatch)
        print(f"http://127.0.0.1:{listening.getsockname()[1]}/v1 serves {steered.name}", flush=True)
        config = uvicorn.Config(app(steered), log_level="warning", server_header=False, timeout_graceful_shutdown=5)
        with contextlib.suppress(KeyboardInterrupt):  # which ends it; uvicorn passes it on when it has stopped
            uvicorn.Server(config).run(sockets=[listening])


def _edit(word: str) -> Any:
    from unweave.core.errors import UnweaveError
    from unweave.core.files import parse_yaml
    from unweave.methods.steer.spec import EditSpec

    value = parse_yaml(word, "--edits") if word[:1] == "{" else {"latent": word}
    if not isinstance(value, dict):
        raise UnweaveError(
            f"{word!r} is not an edit", where="--edits", remedy="write {latent: resid_post.9/1, value: 8}"
        )
    return EditSpec.from_dict(value, where="--edits")


def _opened(
    saes: list[str],
    edits: list[Any],
    records: Path | None,
    persist: bool,
    model: str | None,
    device: str | None,
    accept_mismatch: str | None,
) -> Any:
    from unweave.core.run import Run
    from unweave.core.site import Site
    from unweave.inputs.saes import open_saes
    from unweave.inputs.spec import OfSAEsSpec
    from unweave.latents.result import LatentRecords
    from unweave.latents.stage import load_all
    from unweave.methods.steer.server import Steered

    known = {} if records is None else load_all(Run.at(records, LatentRecords))
    opened = open_saes(OfSAEsSpec(saes=tuple(saes), model=model, device=device, accept_mismatch=accept_mismatch))

    def maximum(site: Site, latent: int) -> float:
        from unweave.core.errors import UnweaveError

        if site not in known:
            raise UnweaveError(f"the records are not of {site}", where=str(records), remedy="give a value")
        return known[site].latent(latent).maximum

    of_records = maximum if records is not None else None
    return Steered(opened.lm, opened.saes, tuple(edits), of_records, persist)
