"""Where models and texts come from: the catalogue, a folder, a GGUF file, or the hub.

Loading never executes code that came with a model: no remote code, safetensors only, archives only unpacked.
GGUF files are converted once to a safetensors folder in the cache, which then loads in about a second.
"""

from __future__ import annotations

import difflib
import errno
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from unweave.core.contents import sha256
from unweave.core.errors import UnweaveError, UnweaveWarning
from unweave.core.files import read_json
from unweave.core.memory import refuse_if_memory
from unweave.core.progress import say, task
from unweave.lm.catalogue import CATALOGUE, CatalogueEntry
from unweave.lm.fetch import building, cache_dir, fetch_package

if TYPE_CHECKING:
    import torch

__all__ = ["CATALOGUE", "CatalogueEntry", "Located", "cache_dir", "fetch_package", "fetch_text", "load_pretrained",
           "load_tokenizer", "locate"]  # fmt: skip

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


class Located(NamedTuple):
    """Where a model is: a folder (or a hub id) to load from, or a folder and the GGUF file in it."""

    path: Path | str
    gguf_file: str | None
    name: str
    note: str


def locate(source: str | Path) -> Located:
    """Finds a model by catalogue name, folder, ``*.gguf`` file, or hub id ``org/name``; fetches catalogue entries.

    ``note`` says what was done to the weights, e.g. "dequantised from Q4_1" ("" when nothing). Raises UnweaveError
    when nothing fits the source.
    """
    text = str(source)
    entry = CATALOGUE.get(text.lower())
    if entry is not None and entry.kind == "model":
        folder = fetch_package(entry)
        if entry.form == "llama2c":
            from unweave.lm.llama2c import converted

            return Located(converted(folder / entry.file), None, entry.name, "")
        return Located(folder, entry.file, entry.name, _gguf_note(entry.about))
    path = Path(text).expanduser()
    if text.endswith(".gguf"):
        if not path.is_file():
            raise UnweaveError("no such GGUF file", where=text, remedy="check the path")
        return Located(path.resolve().parent, path.name, path.stem, _gguf_note(path.stem))
    if path.is_dir():
        if not (path / "config.json").is_file():
            files = sorted(child.name for child in path.glob("*.gguf"))
            hint = f"give the file itself: {path / files[0]}" if files else "give a folder with a config.json"
            raise UnweaveError("this folder holds no Hugging Face model", where=str(path.resolve()), remedy=hint)
        return Located(path.resolve(), None, path.resolve().name, _own_note(path))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and text[0] not in "./~":
        return Located(text, None, text, "")
    names = [name for name, e in CATALOGUE.items() if e.kind == "model"]
    close = difflib.get_close_matches(text.lower(), names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    remedy = f"{hint}give one of {', '.join(names)}; a folder; a .gguf file; or a hub id org/name"
    raise UnweaveError(f"no model {text!r}", where=str(path) if "/" in text else "", remedy=remedy)


def _own_note(folder: Path) -> str:
    """What ``unweave compress`` wrote of a folder's weights; "" where there is nothing."""
    path = folder / "unweave.json"
    written = read_json(path) if path.is_file() else {}
    note = written.get("note") if isinstance(written, dict) else None
    return note if isinstance(note, str) else ""


def _gguf_note(text: str) -> str:
    """What the name of a GGUF file or a catalogue line says of its precision; conversion reads it from the file."""
    match = re.search(r"\b(I?Q\d\w*)\b", text, re.IGNORECASE)
    return f"dequantised from {match[1].upper()}" if match else "converted from GGUF"


def load_pretrained(source: str | Path, dtype: torch.dtype, device: torch.device | str) -> tuple[Any, Any, Located]:
    """The Hugging Face causal language model of a source, its tokenizer (None when it has none), and where it was.

    The model is in evaluation mode on ``device`` with parameters of type ``dtype``. Models whose attention scores
    are soft-capped get eager attention, the one kernel that applies the cap everywhere. Raises UnweaveError when
    nothing fits the source, or its files are missing, damaged, incomplete, or would need foreign code to load.
    """
    located = locate(source)
    folder, located = _ready(located)
    model = _load_model(folder, dtype, str(source))
    tokenizer = _load_tokenizer(folder, str(source))
    with _refusals(str(folder), f"cannot put {str(source)!r} on {device}", "use another device"):
        return model.to(device).eval(), tokenizer, located


def load_tokenizer(source: str | Path) -> Any:
    """Only the tokenizer of a source, None when it has none; errors as in ``load_pretrained``."""
    folder, _ = _ready(locate(source))
    return _load_tokenizer(folder, str(source))


def fetch_text(name: str) -> Path:
    """The file or folder of a catalogue text, fetched on the first call. UnweaveError for an unknown name."""
    entry = CATALOGUE.get(name)
    if entry is None or entry.kind != "text":
        names = ", ".join(key for key, e in CATALOGUE.items() if e.kind == "text")
        raise UnweaveError(f"no text {name!r} in the catalogue", remedy=f"give one of {names}")
    return fetch_package(entry) / entry.file


def _ready(located: Located) -> tuple[Path | str, Located]:
    """A folder or hub id that transformers loads directly; a GGUF file is converted the first time."""
    if located.gguf_file is None:
        return located.path, located
    folder = _convert_gguf(Path(located.path) / located.gguf_file, located.name)
    note = json.loads((folder / "unweave.json").read_text(encoding="utf-8"))["note"]
    return folder, located._replace(note=note)


def _convert_gguf(path: Path, name: str) -> Path:
    """The safetensors folder made from a GGUF file, named by the file's whole content (two fine-tunes may differ in the
    middle alone) and transformers' major version."""
    major = metadata.version("transformers").split(".")[0]
    folder = cache_dir() / "converted" / f"{name}-{sha256(path)[:12]}-transformers{major}"
    with building(folder) as work:
        if work is None:
            return folder
        note = _check_gguf(path)
        say(f"{name} is converted once to float32, several times the file's {path.stat().st_size / 1e9:.1f} GB")
        with _refusals(str(path), "the GGUF file cannot be read", "get the file again; is its family supported?"):
            from transformers import AutoModelForCausalLM, AutoTokenizer

            with quiet(), _gguf_progress(name):
                tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
                model: Any = AutoModelForCausalLM.from_pretrained(
                    path.parent,
                    gguf_file=path.name,
                    dtype="float32",
                    quantization_config=_dequantise(),
                    local_files_only=True,
                )
                # The weights are plain float32 now; what still says "quantised" would make saving refuse.
                model.hf_quantizer = None
                if hasattr(model.config, "quantization_config"):
                    del model.config.quantization_config
                model.save_pretrained(work / "out")
                tokenizer.save_pretrained(work / "out")
        (work / "out" / "unweave.json").write_text(json.dumps({"note": note}), encoding="utf-8")
    return folder


def _dequantise() -> Any:
    """Asks transformers for plain weights; versions that can keep a GGUF file's blocks packed need to be told."""
    import transformers

    kind = getattr(transformers, "GgufConfig", None)
    return kind(dequantize=True) if kind is not None else None


@contextmanager
def _gguf_progress(name: str) -> Iterator[None]:
    """Shows the conversion as our own progress, in place of the bar that transformers draws on the terminal."""
    from transformers import modeling_gguf_pytorch_utils as module

    def counted(items: Any, *, desc: str = "") -> Iterator[Any]:
        del desc
        with task(f"convert {name}", total=len(items), unit="tensors") as shown:
            for item in items:
                yield item
                shown.advance()

    original = getattr(module, "tqdm", None)
    setattr(module, "tqdm", counted)  # noqa: B010 - a plain assignment would claim a type that it has not
    try:
        yield
    finally:
        setattr(module, "tqdm", original)  # noqa: B010


def _check_gguf(path: Path) -> str:
    """Reads a GGUF file's table of contents; returns a note on its precision. UnweaveError when it is damaged."""
    remedy = "get the file again"
    try:
        import gguf
    except ImportError:
        what = "GGUF files need the packages gguf and accelerate"
        raise UnweaveError(what, where=str(path), remedy="pip install gguf accelerate") from None
    with open(path, "rb") as handle:
        if handle.read(4) != b"GGUF":
            raise UnweaveError("this is not a GGUF file", where=str(path), remedy=remedy)
    with _refusals(str(path), "the GGUF file is damaged or cut short", remedy):
        reader = gguf.GGUFReader(path)
        field = reader.get_field("general.file_type")
        kind = gguf.LlamaFileType(int(field.contents())).name.removeprefix("MOSTLY_") if field else "GGUF"
        kind = kind.removeprefix("ALL_")
    return f"dequantised from {kind}" if re.match(r"I?Q\d|TQ|MX", kind) else f"converted from {kind}"


def _load_model(folder: Path | str, dtype: torch.dtype, source: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    from unweave.lm.admission import check_config, check_model

    with _refusals(str(folder), f"cannot load {source!r}", _remedy(folder)), quiet():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        check_config(config, repr(source))
        capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            low_cpu_mem_usage=True,
            output_loading_info=True,
            attn_implementation="eager" if capped else None,
        )
    model, loading = loaded
    check_model(model)
    _check_whole(model, loading, folder, source)
    return model


def _check_whole(model: Any, loading: dict[str, Any], folder: Path | str, source: str) -> None:
    """Refuses a model some of whose weights were not in its files, and warns of tensors that were for no part of it."""
    missing = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    of_head = {id(tensor) for tensor in model.get_output_embeddings().parameters()}
    if missing and set(missing) <= {name for name, tensor in model.named_parameters() if id(tensor) in of_head}:
        what = f"the weights of {source!r} have no language-model head: {', '.join(missing)} is missing"
        remedy = "give the whole causal language model; these files hold only what stands below its head"
        raise UnweaveError(what, where=str(folder), remedy=remedy)
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")
        remedy = "get the files again, or check that config.json belongs to these weights"
        raise UnweaveError(f"the weights of {source!r} are incomplete: {shown}", where=str(folder), remedy=remedy)
    unexpected = sorted(loading["unexpected_keys"])
    if unexpected:
        warnings.warn(
            f"{source}: {len(unexpected)} stored tensors belong to no part of the model, e.g. {unexpected[0]}",
            UnweaveWarning,
            stacklevel=4,
        )


def _load_tokenizer(folder: Path | str, source: str) -> Any:
    if isinstance(folder, Path) and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    with _refusals(str(folder), f"cannot load the tokenizer of {source!r}", _remedy(folder)), quiet():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _remedy(folder: Path | str) -> str:
    if isinstance(folder, str):
        return (
            "check the name and the network (a gated model needs `hf auth login`); without a hub, give a folder, "
            "a .gguf file or a name that `unweave models` lists"
        )
    return "get the files again; weights must be in safetensors files, and models that bring their own code are refused"


@contextmanager
def _refusals(where: str, what: str, remedy: str) -> Iterator[None]:
    """Whatever a foreign reader raises on bad files becomes one UnweaveError; it may raise almost anything."""
    try:
        yield
    except UnweaveError:
        raise
    except ImportError as error:
        raise UnweaveError(f"{what}: {_short(error)}", where=where, remedy="install the package it names") from error
    except Exception as error:
        refuse_if_memory(error, where)
        full = "os error 28" in str(error) or getattr(error, "errno", None) == errno.ENOSPC
        if full or isinstance(error, PermissionError):  # whoever owns the folder explains these
            raise OSError(errno.ENOSPC if full else errno.EACCES, _short(error), where) from error
        raise UnweaveError(f"{what}: {_short(error)}", where=where, remedy=remedy) from error


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and log lines; what matters of them is checked or shown by us."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
