"""Memory that runs out while a file is read is no damaged file: it is named, with a remedy of its own."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import transformers as hf

from unweave.core.codes import Codes
from unweave.core.errors import UnweaveError
from unweave.core.files import read_text
from unweave.core.halving import out_of_memory as where_rows_are_halved
from unweave.core.memory import out_of_memory
from unweave.lm.model import LM
from unweave.sae.formats.tensors import read_safetensors


def wrapped() -> Exception:
    """What a library makes of it that knows no better."""
    error = ValueError("Unable to load weights from the checkpoint file")
    error.__cause__ = OSError(errno.ENOMEM, "Cannot allocate memory")
    return error


ERRORS: dict[str, Callable[[], Exception]] = {
    "python": MemoryError,
    "mmap": lambda: OSError(errno.ENOMEM, "Cannot allocate memory"),
    "mmap of PyTorch": lambda: RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)"),
    "PyTorch": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    "PyTorch on Windows": lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"),
    "a GPU": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "safetensors": lambda: safetensors.SafetensorError("Error while reading: Cannot allocate memory (os error 12)"),
    "C++": lambda: RuntimeError("std::bad_alloc"),
    "wrapped": wrapped,
}


def raising(error: Exception) -> Callable[..., Any]:
    def work(*_args: Any, **_named: Any) -> Any:
        raise error

    return work


def refused_as_memory(work: Callable[[], Any], where: str) -> None:
    with pytest.raises(UnweaveError, match="not enough memory to read it") as caught:
        work()
    assert where in caught.value.where
    said = str(caught.value)
    assert "memory" in caught.value.remedy and "damaged" not in said and "again" not in said


@pytest.mark.parametrize("which", ERRORS)
def test_files_that_memory_does_not_hold(
    which: str, tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ERRORS[which]()
    assert out_of_memory(error)
    assert where_rows_are_halved is out_of_memory
    tiny("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(hf.AutoModelForCausalLM, "from_pretrained", raising(error))
        refused_as_memory(lambda: LM.load(str(tmp_path)), tmp_path.name)
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.load_file", raising(error))
        refused_as_memory(lambda: read_safetensors(weights), weights.name)
    if isinstance(error, OSError):
        with monkeypatch.context() as patch:
            patch.setattr("safetensors.safe_open", raising(error))
            refused_as_memory(lambda: Codes.load(weights), weights.name)
            patch.setattr("builtins.open", raising(error))
            refused_as_memory(lambda: read_text(weights), weights.name)


def test_other_faults_are_no_lack_of_memory(tmp_path: Path) -> None:
    said = UnweaveError("out of memory")
    for error in (ValueError("out of memory"), OSError(errno.ENOENT, "No such file"), RuntimeError("shapes"), said):
        assert not out_of_memory(error)
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UnweaveError, match="damaged"):
        read_safetensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("kind", ["model", "sae"])
def test_a_process_that_may_not_have_more(kind: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    """The real thing: a limit on the address space below what the file needs."""
    if kind == "model":
        config = hf.LlamaConfig(
            vocab_size=24_000, hidden_size=512, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
        )
        hf.LlamaForCausalLM(config).save_pretrained(tmp_path)
        work = (
            "from unweave.lm.model import LM\nimport transformers.models.llama.modeling_llama\nLIMIT\n"
            f"LM.load({str(tmp_path)!r}, device='cpu')"
        )
    else:
        from safetensors.torch import save_file

        save_file({"W": torch.zeros(24_000, 1024)}, tmp_path / "x.safetensors")
        work = (
            "from pathlib import Path\nfrom unweave.sae.formats.tensors import read_safetensors\n"
            f"import safetensors.torch\nLIMIT\nread_safetensors(Path({str(tmp_path / 'x.safetensors')!r}))"
        )
    limit = (
        "import resource, re\nnow = int(re.search(r'VmSize:\\s+(\\d+)', open('/proc/self/status').read())[1]) << 10\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + (48 << 20),) * 2)"
    )
    code = work.replace("LIMIT", limit)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "UnweaveError: not enough memory to read it" in done.stderr, done.stderr
