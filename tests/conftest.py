"""Fixtures for every test: tiny random models, a tiny tokenizer, a small finished training, the default real model."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from helpers.models import FAMILIES, build_tiny, build_tiny_tokenizer
from helpers.progress import ShownTask

# How long a draw takes says what else the machine does, nothing of us.
hypothesis.settings.register_profile("ours", suppress_health_check=[hypothesis.HealthCheck.too_slow], deadline=None)
hypothesis.settings.load_profile("ours")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests run beside each other; more threads than cores make all of them slower, and sums less repeatable."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """`tiny(family, seed=0, vocab_size=97)`: a fresh tiny random model, the same weights for the same arguments."""
    return build_tiny


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """`make_tokenizer(add_bos=False, chat_template=CHATML)`: a fresh tiny tokenizer."""
    return build_tiny_tokenizer


@pytest.fixture
def tiny_tokenizer() -> Any:
    """A fresh tiny tokenizer with a ChatML template; adds no BOS to plain text, as SmolLM2's."""
    return build_tiny_tokenizer()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Runs the test once for every family."""
    return request.param


@pytest.fixture
def tiny_lm() -> Callable[..., Any]:
    """`tiny_lm(family="llama", seed=0)`: an LM around a fresh tiny model with the tiny tokenizer."""
    from unweave.lm.model import LM

    def make(family: str = "llama", seed: int = 0) -> Any:
        return LM(build_tiny(family, seed), build_tiny_tokenizer())

    return make


@pytest.fixture(scope="session")
def default_lm() -> Any:
    """SmolLM2-135M-Instruct, the default model (fetched once into the cache, then about a second a session)."""
    from unweave.lm.model import LM

    return LM.load("smollm2-135m-instruct")


@pytest.fixture
def shown_tasks() -> Iterator[list[ShownTask]]:
    """The long work that is announced during the test."""
    from unweave.core import progress

    shown: list[ShownTask] = []
    progress.set_display(lambda *about: (shown.append(ShownTask(*about)), shown[-1])[1])
    yield shown
    progress.set_display(None)


@pytest.fixture
def generator() -> torch.Generator:
    """A generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ and text/, a few hundred short documents; ``helpers.jobs.spec_of(home)`` trains on it."""
    from helpers.jobs import write_home

    folder = tmp_path_factory.mktemp("home")
    write_home(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for runs."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(home: Path, runs: Path) -> Any:
    """The finished run of ``spec_of(home)`` in ``runs``."""
    from helpers.jobs import spec_of
    from unweave.methods.train import stage as train

    return train.run(spec_of(home), runs)
