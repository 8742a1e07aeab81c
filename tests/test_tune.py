"""The search as a command.

It never reads the test split, survives signals and kills, is shared by processes, stops poor
trials, and ends in a command that gives the best trial's figure again.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import time
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import _be, _wait, call

import train
from extras import tune

optuna = pytest.importorskip("optuna")
WAIT = 240  # seconds: a machine may be busy


def common(root: Path) -> list[str]:
    return [
        "--data-root", str(root), "--epochs", "1", "1", "--epoch-steps", "2", "2",
        "--batch-size", "4", "--image-size", "32", "64", "--backbone-weights", "none",
        "--device", "cpu", "--workers", "0",
    ]  # fmt: skip


def arguments(root: Path, out: Path, trials: int) -> list[str]:
    return ["--trials", str(trials), "--val-ids", "2", "--out", str(out), *common(root)]


def rows(out: Path) -> list[dict]:
    return json.loads((out / "trials.json").read_text())


@pytest.fixture(scope="module")
def found(tiny_data, tmp_path_factory):
    """A search of two trials on data whose test images cannot be read: OUT and what it printed."""
    root = tmp_path_factory.mktemp("blind") / "synthetic"
    shutil.copytree(tiny_data, root)
    for split in ("query", "bounding_box_test"):
        for path in (root / "rgbir" / split).rglob("*.*"):
            path.write_bytes(b"")
    done = call(tune, *arguments(root, root / "tune", 2), timeout=WAIT)
    assert done.returncode == 0, done.stderr
    return root, done.stdout


def test_trials_never_read_the_test_split_and_start_from_what_was_given(found):
    out, printed = found[0] / "tune", found[1]
    best, other = rows(out)
    assert {best["trial"], other["trial"]} == {0, 1}
    assert best["validation_mAP"] >= other["validation_mAP"] == other["curve"][-1]
    assert min((best, other), key=lambda row: row["trial"])["values"]["lr 1"] == 2.5e-3
    assert re.findall(r"trial (\d): python train.py", printed) == ["0", "1"]
    # Only the best one's checkpoint stays; the test is in no log
    assert [path.parent.name for path in out.glob("*/last.pt")] == [f"trial-00{best['trial']}"]
    logs = [path.read_text() for path in out.glob("*/log.jsonl")]
    assert len(logs) == 2 and not any('"event": "test"' in log for log in logs)


def test_the_best_command_gives_the_best_figure_again(found, tiny_data, tmp_path):
    root, printed = found
    command = printed.splitlines()[-1].replace(f"--data-root {root}", f"--data-root {tiny_data}")
    words = shlex.split(command)
    assert words[:2] == ["python", "train.py"] and "--resume" not in words
    done = call(train, *words[2:], "--out", tmp_path, timeout=WAIT)
    assert done.returncode == 0, done.stderr
    assert tune.validation(tmp_path)[-1] == rows(root / "tune")[0]["validation_mAP"]


def test_what_is_done_counts_and_other_options_are_refused(found):
    root, printed = found
    again = call(tune, *arguments(root, root / "tune", 2), timeout=WAIT)
    assert again.returncode == 0 and "settings:" not in again.stdout
    assert again.stdout.splitlines()[-1] == printed.splitlines()[-1]
    other = call(tune, *arguments(root, root / "tune", 2), "--seed", "1", timeout=WAIT)
    assert other.returncode == 2 and other.stderr.count("\n") == 1
    assert "give the same options, or choose another --out" in other.stderr


def test_killed_then_stopped_then_shared_by_two_processes(found, tiny_data, tmp_path, monkeypatch):
    draw, order = train.Run.draw, arguments(tiny_data, tmp_path, 3)

    def fatal(number: int, stage: int):
        def draws(run, key):
            if key[1] == stage:
                os.kill(os.getpid(), number)
            return draw(run, key)

        monkeypatch.setattr(train.Run, "draw", draws)

    fatal(signal.SIGKILL, stage=2)
    assert call(tune, *order, timeout=WAIT).returncode == -signal.SIGKILL
    fatal(signal.SIGTERM, stage=2)
    stopped = call(tune, *order, timeout=WAIT)
    assert stopped.returncode == 143 and "stage 1 epoch" not in stopped.stdout
    assert stopped.stderr == f"{tmp_path}: stopped in trial 0; the same command goes on\n"
    monkeypatch.setattr(train.Run, "draw", draw)
    if (child := os.fork()) == 0:
        _be(tune, order, tmp_path / "other")
    here = call(tune, *order, timeout=WAIT)
    assert here.returncode == 0 == _wait(child, time.monotonic() + WAIT), here.stderr
    there = (tmp_path / "other.out").read_text()
    trained = [re.findall(r"trial (\d): python", text) for text in (here.stdout, there)]
    assert sorted(trained[0] + trained[1]) == ["0", "1", "2"]
    assert {row["trial"] for row in rows(tmp_path)} == {0, 1, 2}
    # As if it had never been stopped
    figure = {row["trial"]: row["curve"] for row in rows(tmp_path)}
    assert figure[0] == {row["trial"]: row["curve"] for row in rows(found[0] / "tune")}[0]
    assert not list(tmp_path.glob("*.lock"))


def test_a_poor_trial_is_stopped_by_its_validation_curve(tiny_data, tmp_path):
    words = [*common(tiny_data), "--val-ids", "2"]
    base = train.parse(words)
    study = tune.open_study(Namespace(out=tmp_path), words, 2, tune.searched(base))
    for _ in range(5):
        curve = {1: 0.99, 2: 0.995}
        study.add_trial(optuna.trial.create_trial(value=0.995, intermediate_values=curve))
    done = call(tune, *arguments(tiny_data, tmp_path, 7), timeout=WAIT)
    assert done.returncode == 0, done.stderr
    ends = {row["trial"]: (row["state"], len(row["curve"])) for row in rows(tmp_path)}
    assert ends[0] == ("complete", 2)  # what was given is not stopped
    assert ends[6] == ("pruned", 1)
    assert "trial 6: stopped, its validation is below the median" in done.stdout
    assert (tmp_path / "importances.png").stat().st_size > 1000


def test_a_trial_that_diverges_is_a_poor_one(tiny_data, tmp_path):
    words = [*arguments(tiny_data, tmp_path, 2), "--lr", "1e30", "1e30"]
    done = call(tune, *words, timeout=WAIT)
    assert done.returncode == 0, done.stderr
    ends = {row["trial"]: row["state"] for row in rows(tmp_path)}
    assert ends[0] == "diverged" and len(ends) == 2
    assert "trial 0: stage 1, epoch 1, step 2: loss or gradient is not finite" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "1"], "--lr"),
        (["--learning", "1"], "unrecognized arguments: --learning 1"),
        (["--epochs", "0", "0"], "--epochs 0 0: no epoch to validate after"),
        (["--val-ids", "1"], "expected a whole number of at least 2"),
        (["--val-ids", "4"], "number of identities in the training data is 0"),
        (["--modalities", "rgb,xray"], "no modality xray"),
        (["--backbone-weights", "no.pth"], "no.pth: no such file"),
    ],
)
def test_mistakes_give_one_line_and_leave_no_trace(tiny_data, tmp_path, words, message):
    done = call(tune, *arguments(tiny_data, tmp_path / "out", 1), *words)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_torchrun_a_missing_optuna_and_a_damaged_journal(tiny_data, tmp_path, monkeypatch):
    words = arguments(tiny_data, tmp_path / "out", 1)
    done = call(tune, *words, ranks=2)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "leave torchrun out" in done.stderr
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "journal.log").write_text("{}\n")
    done = call(tune, *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "journal.log: not a journal of optuna's" in done.stderr
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = call(tune, *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "which is not installed: pip install optuna" in done.stderr


def test_what_is_searched_depends_on_what_is_in_use():
    def names(*words: str) -> set[str]:
        return set(tune.searched(train.parse(words)))

    assert names("--dataset", "rgbnt100") == set(tune.SPACE) - {
        "backbone_lr 1", "backbone_lr 2", "beta 1",
    }  # fmt: skip
    assert "backbone_lr 2" in names("--dataset", "rgbnt100", "--recipe", "plus")
    assert "alpha" not in names("--alpha", "0")
    assert not any(name.endswith(" 1") for name in names("--epochs", "0", "2"))
    assert "warmup_steps" not in names("--schedule", "constant", "constant")
    base = train.parse(["--recipe", "plus"])
    given = tune.searched(base)
    values = {name: 2 * value for name, value in given.items()}
    again = train.parse(["--recipe", "plus", *tune.options(base, values)])
    assert tune.searched(again) == values
