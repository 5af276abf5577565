"""The command line, tried on a pretend stage: what it reads, prints, refuses, and with which exit status it leaves."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from unweave.cli import stages
from unweave.cli.app import main
from unweave.cli.fields import field_docs, leaves
from unweave.cli.output import in_words
from unweave.cli.progress import PLAIN_INTERVAL, PlainTask, in_time, short, show_progress
from unweave.core import progress
from unweave.core.errors import UnweaveError
from unweave.core.result import Result, Row
from unweave.core.run import Run
from unweave.core.spec import Spec, operational
from unweave.inputs.spec import OfSAESpec, OfSAEsSpec

REAL_STAGES = dict(stages.stages())


@dataclass(frozen=True, kw_only=True)
class TextSpec(Spec):
    """One text."""

    path: str
    """Where it is."""
    weight: float = 1.0
    """How much of it."""


@dataclass(frozen=True, kw_only=True)
class DataSpec(Spec):
    """Which text, and how much of it."""

    context: int = 512
    """Tokens in a row at most."""
    texts: tuple[TextSpec, ...] = (TextSpec(path="wiki"),)
    """What to read."""
    max_norm: float | None = None
    """Activations longer than this
    are left out, see `TokenPolicy`."""


@dataclass(frozen=True)
class Pretended(Result):
    """What the pretend stage finds."""

    fvu: float
    tokens: int
    spec: dict[str, Any]
    report: Path

    def rows(self) -> list[Row]:
        return [("fvu", self.fvu, ""), ("tokens", self.tokens, "with a meaning"), ("missing", None, "")]


@dataclass(frozen=True, kw_only=True)
class PretendSpec(Spec):
    """A pretend stage."""

    model: str
    """Which model."""
    kind: Literal["topk", "relu"] = "topk"
    """Which activation function."""
    normalise: bool = False
    """Whether to normalise first."""
    prompts: tuple[str, ...] = ("hello",)
    """What to say."""
    strengths: tuple[float, ...] = ()
    """How strongly."""
    data: DataSpec = DataSpec()
    """The text that is trained on."""
    failure: str = operational("")
    """What to pretend has gone wrong."""


def pretend(spec: PretendSpec, runs: Path) -> Run:
    """Raises what it is told to, else finishes with its own spec as the result."""
    failures: dict[str, Callable[[], BaseException]] = {
        "user": lambda: UnweaveError("no such site: resid_post.99", where="llama", remedy="there are 3 layers"),
        "bug": lambda: RuntimeError("index out of range\nand more"),
        "disk": lambda: OSError(errno.ENOSPC, "No space left on device", "/full/file"),
        "access": lambda: PermissionError(errno.EACCES, "Permission denied", "/forbidden/file"),
        "memory": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    }
    if spec.failure == "interrupt":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs do not have
        os.kill(os.getpid(), signal.SIGINT)
    if spec.failure:
        raise failures[spec.failure]()
    with Run.open(runs, "pretend", spec, kind=Pretended) as run:
        if not run.done:
            print("a library prints this")
            os.system("echo a child process prints this")
            with progress.task("count", total=10, unit="things") as task:
                task.advance(10)
            run.finish(Pretended(0.123456, 1234567, spec.to_dict(), Path("report.html")))
    return run


@pytest.fixture(autouse=True)
def _pretend_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    here = f"{__name__}:"
    stage = replace(REAL_STAGES["train"], spec=PretendSpec, stage=f"{here}pretend")
    monkeypatch.setitem(stages.stages(), "train", stage)


@pytest.fixture
def train(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `unweave train ...` in a folder of its own; gives (status, standard output, standard error)."""

    def run(*argv: str) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main(["train", "--runs", str(tmp_path / "runs"), *argv])
        return status, *capfd.readouterr()

    return run


def asked(out: str) -> dict[str, Any]:
    return json.loads(out)["result"]["spec"]


# What is read


def test_options_become_fields_of_the_spec(train: Callable[..., tuple[int, str, str]]) -> None:
    options = [
        "--model",
        "m",
        "--kind",
        "relu",
        "--normalise",
        "--data.context",
        "7",
        "--data.max-norm",
        "2.5",
        "--prompts",
        "a",
        "b",
    ]
    status, out, _ = train(*options, "--json")
    assert status == 0
    assert (
        asked(out)
        == PretendSpec(
            model="m", kind="relu", normalise=True, prompts=("a", "b"), data=DataSpec(context=7, max_norm=2.5)
        ).to_dict()
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.yaml", "model: m\nkind: relu\ndata:\n  context: 7\n  max_norm: 3\n"),
        ("c.toml", 'model = "m"\nkind = "relu"\n[data]\ncontext = 7\nmax_norm = 3\n'),
    ],
)
def test_options_win_over_the_file_and_the_file_over_defaults(
    name: str, text: str, train: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    status, out, _ = train(str(tmp_path / name), "--data.context", "9", "--json")
    assert status == 0
    found = asked(out)
    assert (found["model"], found["kind"]) == ("m", "relu")
    assert found["data"] == {"context": 9, "max_norm": 3.0, "texts": [{"path": "wiki", "weight": 1.0}]}
    assert found["normalise"] is False


def test_no_flag_overrides_a_true_in_the_file(train: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: m\nnormalise: true\n")
    assert asked(train(str(tmp_path / "c.yaml"), "--json")[1])["normalise"] is True
    assert asked(train(str(tmp_path / "c.yaml"), "--no-normalise", "--json")[1])["normalise"] is False


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["a.txt", "b.txt"], [("a.txt", 1.0), ("b.txt", 1.0)]),
        (["{path: a.txt, weight: 2}", "b.txt"], [("a.txt", 2.0), ("b.txt", 1.0)]),
        (["[{path: a.txt, weight: 2}, {path: b.txt}]"], [("a.txt", 2.0), ("b.txt", 1.0)]),
        (["a.txt"], [("a.txt", 1.0)]),
    ],
)
def test_lists_of_groups(
    words: list[str], texts: list[tuple[str, float]], train: Callable[..., tuple[int, str, str]]
) -> None:
    _, out, _ = train("--model", "m", "--data.texts", *words, "--json")
    assert [(t["path"], t["weight"]) for t in asked(out)["data"]["texts"]] == texts


def test_negative_numbers_are_values(train: Callable[..., tuple[int, str, str]]) -> None:
    _, out, _ = train("--model", "m", "--data.max_norm", "-2.5", "--strengths", "1", "-2", "4e-1", "--json")
    assert asked(out)["data"]["max_norm"] == -2.5
    assert asked(out)["strengths"] == [1.0, -2.0, 0.4]


def test_brackets_in_plain_words_are_not_read_as_yaml(train: Callable[..., tuple[int, str, str]]) -> None:
    _, out, _ = train("--model", "m", "--prompts", "[INST] hi", "{name}: hi", "--json")
    assert asked(out)["prompts"] == ["[INST] hi", "{name}: hi"]


# What is refused: status 2, what and where and the remedy


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--modle", "m"], ["--modle", "--model"]),
        (["--data.contxt", "7"], ["--data.contxt", "--data.context"]),
        (["--model", "m", "--data.context", "many"], ["many", "whole number", "data.context"]),
        (["--model", "m", "--data.context", "1.5"], ["1.5", "whole number"]),
        (["--model", "m", "--kind", "gelu"], ["gelu", "topk", "relu", "kind"]),
        (["--model", "m", "--data.texts", "[{path: a"], ["--data.texts", "YAML"]),
        (["--model", "m", "--prompts"], ["--prompts", "TEXT"]),
        (["--model"], ["--model"]),
        ([], ["model"]),
        (["missing.yaml"], ["missing.yaml", "configuration"]),
        (["a.yaml", "b.yaml"], ["b.yaml"]),
    ],
)
def test_mistakes_are_named_with_a_remedy(
    argv: list[str], words: list[str], train: Callable[..., tuple[int, str, str]]
) -> None:
    status, out, err = train(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert "remedy: " in err
    assert [word for word in words if word not in err] == []


def test_an_unknown_key_in_a_file_is_refused_with_a_suggestion(
    train: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text("model: m\ndata: {contxt: 7}\n")
    status, _, err = train(str(tmp_path / "c.yaml"))
    assert status == 2
    assert "contxt" in err
    assert "did you mean 'context'" in err
    assert "c.yaml" in err


def test_an_unknown_command_is_refused_with_a_suggestion(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert '"train"' in capfd.readouterr().err


def test_commands_in_a_group_are_parsed_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any) -> None:
    """Exits, output and mistakes are those of any command, and messages name the whole command."""
    here = f"{__name__}:"
    stage = replace(REAL_STAGES["circuit find"], spec=PretendSpec, stage=f"{here}pretend")
    monkeypatch.setitem(stages.stages(), "circuit find", stage)
    line = ["circuit", "find", "--runs", str(tmp_path / "runs"), "--model", "m"]
    assert main([*line, "--json"]) == 0
    assert asked(capfd.readouterr().out)["model"] == "m"
    assert main(line) == 0
    assert "unweave circuit find" in capfd.readouterr().out
    for words, where, hint in (
        (["circuit", "fnd"], "where: unweave circuit\n", '"find"'),
        (["circuit", "find", "--modle", "m"], "where: unweave circuit find\n", "--model"),
        (["paper", "instruct"], "where: unweave paper\n", "instruct-saes"),
    ):
        assert main(words) == 2
        err = capfd.readouterr().err
        assert where in err and hint in err, err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(line) == 2
    assert "circuit find does not divide" in capfd.readouterr().err


# How it ends


@pytest.mark.parametrize(
    ("failure", "status", "words"),
    [
        ("user", 2, ["error: no such site: resid_post.99\n", "where: llama", "remedy: there are 3 layers"]),
        ("disk", 2, ["the disk is full", "/full/file", "what is finished is kept"]),
        ("access", 2, ["permission denied", "/forbidden/file", "--runs"]),
        ("memory", 2, ["not enough memory", "unweave doctor"]),
        ("bug", 1, ["this is our fault", "RuntimeError: index out of range", "UNWEAVE_DEBUG=1"]),
        ("interrupt", 130, ["goes on where it was", "unweave train", "--failure interrupt"]),
    ],
)
def test_exit_statuses(failure: str, status: int, words: list[str], train: Callable[..., tuple[int, str, str]]) -> None:
    got, out, err = train("--model", "m", "--failure", failure)
    assert (got, out) == (status, "")
    assert [word for word in words if word not in err] == []
    assert "Traceback" not in err


@pytest.mark.parametrize(("failure", "status"), [("user", 2), ("bug", 1), ("interrupt", 130)])
def test_errors_are_json_objects_when_asked_for(
    failure: str, status: int, train: Callable[..., tuple[int, str, str]]
) -> None:
    got, out, err = train("--model", "m", "--failure", failure, "--json")
    assert (got, out) == (status, "")
    error = json.loads(err)["error"]
    assert set(error) == {"what", "where", "remedy", "status"}
    assert error["status"] == status
    assert error["what"]


def test_the_traceback_of_our_fault_is_kept(
    train: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, err = train("--model", "m", "--failure", "bug")
    path = re.search(r"where: (\S+)", err)
    assert path is not None
    kept = Path(path[1])
    assert "RuntimeError: index out of range\nand more" in kept.read_text()
    assert "Traceback" in kept.read_text()
    kept.unlink()
    monkeypatch.setenv("UNWEAVE_DEBUG", "1")
    assert "Traceback" in train("--model", "m", "--failure", "bug")[2]


# What is printed


def test_json_is_all_there_is_on_standard_output(train: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    status, out, err = train("--model", "m", "--json")
    assert status == 0
    found = json.loads(out)
    assert out.count("\n") == 1
    assert set(found) == {"run", "reused", "result"}
    assert found["reused"] is False
    assert Path(found["run"]).parent == tmp_path / "runs"
    assert "a library prints this" in err
    assert "a child process prints this" in err
    assert "count" not in err  # no progress
    again = json.loads(train("--model", "m", "--json")[1])
    assert again == found | {"reused": True}


def test_people_see_a_table_the_run_directory_and_the_report(train: Callable[..., tuple[int, str, str]]) -> None:
    _, out, err = train("--model", "m")
    assert re.search(r"fvu\s+0\.1235", out)
    assert "1,234,567" in out
    run = re.search(r"run directory \(made\): (\S+)", out)
    assert run is not None
    assert f"report: {run[1]}/report.html" in out
    assert "count: 10 things in 0 s" in err
    assert f"run directory (reused): {run[1]}" in train("--model", "m")[1]


def test_a_stage_says_what_matters_by_the_rows_of_its_result(train: Callable[..., tuple[int, str, str]]) -> None:
    _, out, _ = train("--model", "m")
    assert re.search(r"tokens\s+1,234,567\s+with a meaning", out)
    assert re.search(r"missing\s+-", out)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (True, "yes"),
        (1234, "1,234"),
        (0.000123456, "0.0001235"),
        (2e6, "2,000,000"),
        ([], "none"),
        ([1] * 9, "9 values"),
    ],
)
def test_values_in_words(value: Any, words: str) -> None:
    assert in_words(value) == words


def test_plain_progress_speaks_now_and_then(capfd: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    task = PlainTask("harvest", 1000, "tokens", 500, clock=lambda: now)  # resumed: half was done before
    task.note("loss 0.3")
    now = PLAIN_INTERVAL - 1
    task.advance(100)
    assert capfd.readouterr().err == ""
    now = 20.0
    task.advance(100)
    assert capfd.readouterr().err == "harvest: 70%, 700 of 1,000 tokens, 10/s, about 30 s left  (loss 0.3)\n"
    now = 80.0
    task.advance(300)
    capfd.readouterr()
    task.close()
    assert capfd.readouterr().err == "harvest: 1,000 tokens in 1 min 20 s  (loss 0.3)\n"
    assert (in_time(7500), short(2514), short(135_000), short(0.25)) == ("2 h 5 min", "2514", "135k", "0.25")


def test_no_estimate_before_it_can_be_known(capfd: pytest.CaptureFixture[str]) -> None:
    """A part of one item says nothing of how long items take; one of several does."""
    now = 0.0
    one = PlainTask("convert", 1, "model", 0, clock=lambda: now)
    several = PlainTask("read", 4, "files", 0, clock=lambda: now)
    unknown = PlainTask("fetch", 0, "files", 0, clock=lambda: now)
    capfd.readouterr()
    now = 20.0
    one.advance(0.004)
    several.advance(0.5)
    unknown.advance()
    assert capfd.readouterr().err == "convert: 0%, 0 of 1 model\nread: 12%, 0 of 4 files\nfetch: 1 files\n"
    now = 40.0
    one.advance(0.9)
    several.advance(0.5)
    unknown.advance()
    expected = "convert: 90%, 1 of 1 model\nread: 25%, 1 of 4 files, 0.025/s, about 2 min 0 s left\n"
    assert capfd.readouterr().err == expected + "fetch: 2 files, 0.05/s\n"


def test_work_without_parts_is_worth_a_line_where_one_had_to_wait(capfd: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    quick, slow = (PlainTask(f"load {name}", 0, "", 0, clock=lambda: now) for name in ("small", "large"))
    now = 1.0
    quick.close()
    now = 5.0
    slow.close()
    assert capfd.readouterr().err == "load large: 5 s\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_work_that_has_enough_is_done_and_an_error_stops_it(
    terminal: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, error: BaseException | None = None) -> str:
        """What is shown of 13 of 20 chunks."""
        with show_progress(False), suppress(KeyboardInterrupt, ValueError), progress.task(name, total=20) as task:
            task.advance(13)
            if error is not None:
                raise error
        return capfd.readouterr().err

    def some_of_many() -> Iterator[int]:
        with progress.task("stream", total=20, unit="chunks") as task:
            for i in range(20):
                yield i
                task.advance()

    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "120")
    capfd.readouterr()
    assert "done" in run("encode") and "stopped" not in run("encode")
    for error in (ValueError(), KeyboardInterrupt()):
        shown = run("encode", error)
        assert "stopped" in shown and "done" not in shown
    with show_progress(False):
        taken = some_of_many()
        assert [next(taken), next(taken)] == [0, 1]
        taken.close()
    shown = capfd.readouterr().err
    assert "done" in shown and "stopped" not in shown
    if not terminal:
        assert shown == "stream: done after 1 of 20 chunks in 0 s\n"
        task = PlainTask("parts", 1, "model", 0)
        for _ in range(10):
            task.advance(0.1)  # adds up to a little less than 1
        task.close()
        assert capfd.readouterr().err == "parts: 1 model in 0 s\n"


# Help


def test_help_teaches(train: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = train("--help")
    assert status == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", out).split())
    for words in (
        "Train sparse autoencoders",
        "unweave train my.yaml --sae.k 64",
        "--model TEXT Which model. [must be given]",
        "--kind topk|relu Which activation function. [default: topk]",
        "The text that is trained on.",
        "--data.context INT Tokens in a row at most. [default: 512]",
        "are left out, see TokenPolicy.",
        "--data.texts PATH... What to read. [default: {path: wiki}]",
    ):
        assert words in text


def test_field_docs_include_inherited_ones() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Child(TextSpec):
        """A child."""

        extra: tuple[int, ...] = field(default_factory=lambda: (1, 2))
        """More."""

    assert field_docs(Child) == {"path": "Where it is.", "weight": "How much of it.", "extra": "More."}
    assert {leaf.shown_default for leaf in leaves(DataSpec)} == {"512", "{path: wiki}", ""}
    extra = list(leaves(Child))[-1]
    assert (extra.metavar, extra.shown_default) == ("INT...", "1 2")


@pytest.mark.parametrize("name", REAL_STAGES)
def test_every_field_of_every_stage_can_be_set_and_is_explained(name: str) -> None:
    found = list(leaves(REAL_STAGES[name].spec))
    assert found
    assert [leaf.name for leaf in found if not leaf.doc] == []
    assert {leaf.name for leaf in found} & {"config", "runs", "json", "help", "version"} == set()
    assert [leaf.name for leaf in found if not leaf.is_flag and leaf.metavar == "VALUE"] == []


@pytest.mark.parametrize("name", REAL_STAGES)
def test_naming_a_group_leaves_its_other_fields_as_help_shows_them(name: str) -> None:
    spec = REAL_STAGES[name].spec
    required = {"sae": "x"} if issubclass(spec, OfSAESpec) else {"saes": ["x"]} if issubclass(spec, OfSAEsSpec) else {}
    given = {"pairs": "x", "attribution": "x", "saes": ["x"], "compressed": ["x"]}
    required |= {f.name: given[f.name] for f in fields(spec) if f.name in given and f.default is MISSING}
    for field_ in fields(spec):
        if isinstance(field_.default, Spec):
            assert getattr(spec.from_dict({**required, field_.name: {}}), field_.name) == field_.default


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_help_and_import_load_no_heavy_library() -> None:
    commands = (*stages.stages(), *stages.GROUPS, "models", "runs", "dedup", "convert", "annotate", "serve")
    names = ["--help", *(f"{name} --help" for name in commands), "models", "--version"]
    done = python(
        "import sys, unweave\n"
        "assert not {'torch', 'transformers', 'rich', 'numpy'} & set(sys.modules)\n"
        "from unweave.cli.app import main\n"
        f"statuses = [main(line.split()) for line in {names!r}]\n"
        "assert set(statuses) == {0}, statuses\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert done.returncode == 0, done.stderr


def waiting(**given: str) -> tuple[str | None, str | None]:
    """What a command line leaves in OMP_WAIT_POLICY, and how often GNU's OpenMP, loaded after it, spins by its word."""
    code = (
        "import os, sys\n"
        "from unweave.cli.app import main\n"
        "assert main(['--version']) == 0 and 'torch' not in sys.modules\n"
        "import torch\n"
        "print('policy', os.environ.get('OMP_WAIT_POLICY'))"
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    environment = own | {"OMP_DISPLAY_ENV": "verbose"} | given
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    policy = re.search(r"policy (\w+)", done.stdout)
    spins = re.search(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)
    return policy and policy[1], spins and spins[1]


def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise() -> None:
    assert waiting() in (("PASSIVE", "0"), ("PASSIVE", None))
    assert waiting(OMP_WAIT_POLICY="active")[0] == "active"
    assert waiting(GOMP_SPINCOUNT="777") in (("None", "777"), ("None", None))
    assert waiting(KMP_BLOCKTIME="200")[0] == "None"


def test_public_names_are_there_when_asked_for() -> None:
    done = python(
        "import unweave\n"
        "assert {'LM', 'SAE', 'Site', 'UnweaveError', '__version__'} <= set(dir(unweave))\n"
        "from unweave import Site, UnweaveError\n"
        "from unweave.core.site import Site as Same\n"
        "assert Site is Same and unweave.Site is Same\n"
        "try: unweave.Nothing\n"
        "except AttributeError as error: assert 'Nothing' in str(error)\n"
        "else: raise SystemExit('no AttributeError')"
    )
    assert done.returncode == 0, done.stderr


def test_models_lists_what_can_be_loaded(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert "smollm2-135m-instruct" in capfd.readouterr().out
    assert main(["models", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    entry = next(e for e in found["models"] if e["name"] == "smollm2-135m-instruct")
    assert entry["licence"] == "Apache-2.0"
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for e in found["models"] + found["texts"] for digest in e["sha256"])


def test_a_reader_that_leaves_early_is_no_error() -> None:
    line = f"{sys.executable} -m unweave models | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_the_command_leaves_with_the_status_it_reports() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "unweave", "eval", "--json", "--sae", "nowhere", "--tokns", "3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "--tokens" in json.loads(done.stderr)["error"]["what"]
