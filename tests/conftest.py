"""What several test files need: a tiny rendered data set, and the programs run as a user would."""

import faulthandler
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: tests run side by side, and fork
if os.environ.get("GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # see test_gpu.py
ROOT = Path(__file__).parent.parent

import train  # noqa: E402
from synthetic import render  # noqa: E402


def pytest_configure(config) -> None:
    """Decoded images go to a folder of this session's, not to the user's."""
    if not hasattr(config, "workerinput"):  # xdist's processes inherit it
        os.environ["XDG_CACHE_HOME"] = config.own_cache = tempfile.mkdtemp()


def pytest_unconfigure(config) -> None:
    if hasattr(config, "own_cache"):
        shutil.rmtree(config.own_cache)


class Done(NamedTuple):
    """How a program ended; of several ranks, the worst exit code and all that they printed."""

    returncode: int
    stdout: str
    stderr: str


def run(*command, **options) -> subprocess.CompletedProcess:
    """Run a command line of the project to its end; output as text."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        timeout=240,
        **options,
    )


def torchrun(processes: int, *command) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return run(*launcher, *command)


def call(program, *arguments, ranks: int = 1, timeout: float = 120) -> Done:
    """program.main() in `ranks` forked processes: as torchrun starts it, without the imports."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                if ranks > 1:
                    own = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank}
                    os.environ |= {name: str(value) for name, value in own.items()} | environment
                _be(program, arguments, Path(folder) / str(rank))
            children.append(child)
        codes = [_wait(child, time.monotonic() + timeout) for child in children]
        outputs = [
            "".join((Path(folder) / f"{rank}.{name}").read_text() for rank in range(ranks))
            for name in ("out", "err")
        ]
    return Done(max(codes, key=abs), *outputs)


def _be(program, arguments, files: Path) -> None:
    """In a forked process: the program, its output in files, and no way back."""
    gc.freeze()  # else the parent's garbage, such as onnxruntime's, waits for threads of the parent
    code = 70
    try:
        for number, name in ((1, "out"), (2, "err")):
            file = open(f"{files}.{name}", "w", buffering=1)  # noqa: SIM115
            os.dup2(file.fileno(), number)
            setattr(sys, f"std{name}", file)
        faulthandler.enable(sys.stderr)
        sys.argv = [program.__name__, *map(str, arguments)]
        program.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _wait(child: int, end: float) -> int:
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGABRT)  # it hung: faulthandler says where
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def succeeds(program, *arguments, **options) -> str:
    """What a program prints that must succeed; see `call`."""
    done = call(program, *arguments, **options)
    assert done.returncode == 0, (arguments, done.stderr)
    return done.stdout


def fails(program, *arguments, **options) -> str:
    """The one line that a user's mistake gives."""
    done = call(program, *arguments, **options)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == 2, done
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def read_json(path) -> dict:
    return json.loads(Path(path).read_text())


def read_log(out, event: str = "") -> list[dict]:
    """The lines of a run's log, or those of one kind: step, epoch, test, ..."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if event in ("", line["event"])]


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A rendered data set: 4 training and 3 test identities, 8 cameras, 2 captures each."""
    root = tmp_path_factory.mktemp("data") / "synthetic"
    sizes = ["--train-ids", 4, "--test-ids", 3, "--captures", 2, "--workers", 1]
    succeeds(render, "--out", root, *sizes)
    return root


@pytest.fixture(scope="session")
def trained(tiny_data, tmp_path_factory) -> Path:
    """Folder of a run of train.py, both stages, on the tiny data set."""
    out = tmp_path_factory.mktemp("runs") / "run"
    stdout = succeeds(train, *tiny_arguments(tiny_data, out))
    (out / "stdout.txt").write_text(stdout)
    return out


def tiny_arguments(root: Path, out: Path) -> list:
    """train.py on the tiny data set: 2 x 8 steps in each stage, random weights, small images."""
    return [
        "--data-root", root, "--out", out, "--epochs", 2, 2, "--batch-size", 8,
        "--backbone-weights", "none", "--device", "cpu", "--precision", "fp32",
        "--image-size", 32, 64, "--schedule", "sqrt", "constant",
        "--flips", 0.5, 0.5, "--erase", 0.5,
    ]  # fmt: skip
