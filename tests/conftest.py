"""What several test files need: a tiny rendered data set and the programs run on it as a user would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: tests run side by side, and fork
ROOT = Path(__file__).parent.parent


def run(*command, **options) -> subprocess.CompletedProcess:
    """Run a command line of the project to its end; output as text."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=240, **options
    )


def torchrun(processes: int, *command) -> subprocess.CompletedProcess:
    return run("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A rendered data set: 4 training and 3 test identities, 8 cameras, 2 captures each."""
    root = tmp_path_factory.mktemp("data") / "synthetic"
    done = run("-m", "extras.synthetic", "--out", root, "--train-ids", 4, "--test-ids", 3, "--captures", 2, "--workers", 1)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="session")
def trained(tiny_data, tmp_path_factory) -> Path:
    """Folder of a run of train.py, both stages, on the tiny data set."""
    out = tmp_path_factory.mktemp("runs") / "run"
    done = run("train.py", *tiny_arguments(tiny_data, out))
    assert done.returncode == 0, done.stderr
    (out / "stdout.txt").write_text(done.stdout)
    return out


def tiny_arguments(root: Path, out: Path) -> list:
    return [
        "--data-root", root, "--out", out, "--epochs", 2, 2, "--batch-size", 8, "--backbone-weights", "none", "--device", "cpu",
        "--precision", "fp32", "--image-size", 32, 64, "--schedule", "sqrt", "constant", "--flips", 0.5, 0.5, "--erase", 0.5,
    ]  # fmt: skip
