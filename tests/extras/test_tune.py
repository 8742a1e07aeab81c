"""The search as a command.

It never looks at the test split, survives signals and kills, is shared by processes, and ends in a
command that gives the best trial's figure again.
"""

import os
import re
import shlex
import signal
import time

import pytest
from conftest import _be, _wait, call, fails, read_json, read_log, succeeds

import options
import train
from extras import tune

pytest.importorskip("optuna")


def search(root, out, trials: int) -> list[str]:
    tiny = (
        f"--trials {trials} --val-ids 2 --epochs 1 --epoch-steps 2 --batch-size 4"
        " --image-size 32 64 --backbone-weights none --device cpu --workers 0"
    )
    return [*tiny.split(), "--data-root", str(root), "--out", str(out)]


@pytest.fixture(scope="module")
def tuned(tiny_data, tmp_path_factory):
    """A search of two trials: OUT, and what it printed."""
    out = tmp_path_factory.mktemp("tune") / "out"
    return out, succeeds(tune, *search(tiny_data, out, 2), timeout=240)


def test_trials_test_nothing_and_start_from_what_was_given(tuned):
    out, printed = tuned
    best, other = read_json(out / "trials.json")
    assert {best["trial"], other["trial"]} == {0, 1}
    assert best["validation_mAP"] >= other["validation_mAP"] == other["curve"][-1]
    assert min((best, other), key=lambda row: row["trial"])["values"]["lr 1"] == 2.5e-3
    assert re.findall(r"trial (\d): python train.py", printed) == ["0", "1"]
    # Only the best one's checkpoint stays
    assert [path.parent.name for path in out.glob("*/last.pt")] == [f"trial-00{best['trial']}"]
    for trial in (0, 1):
        assert len(read_log(out / f"trial-00{trial}", "epoch")) == 2
        assert not read_log(out / f"trial-00{trial}", "test")


def test_the_best_command_gives_the_best_figure_again(tuned, tmp_path):
    out, printed = tuned
    python, program, *words = shlex.split(printed.splitlines()[-1])
    assert (python, program) == ("python", "train.py")
    assert "--resume" not in words
    succeeds(train, *words, "--out", tmp_path)
    best, *_ = read_json(out / "trials.json")
    assert read_log(tmp_path, "epoch")[-1]["validation"]["mAP"] == best["validation_mAP"]


def test_what_is_done_counts_and_other_options_are_refused(tuned, tiny_data):
    out, printed = tuned
    again = succeeds(tune, *search(tiny_data, out, 2))
    assert "settings:" not in again
    assert again.splitlines()[-1] == printed.splitlines()[-1]
    text = fails(tune, *search(tiny_data, out, 2), "--seed", "1")
    assert "give the same options, or choose another --out" in text


def test_killed_then_stopped_then_shared_by_two_processes(tuned, tiny_data, tmp_path, monkeypatch):
    passes, order = train.Batches.passes, search(tiny_data, tmp_path, 3)

    def fatal(number: int) -> None:
        def ends(batches, source, key):
            if key[1] == 2:  # the stage
                os.kill(os.getpid(), number)
            return passes(batches, source, key)

        monkeypatch.setattr(train.Batches, "passes", ends)

    fatal(signal.SIGKILL)
    assert call(tune, *order).returncode == -signal.SIGKILL
    fatal(signal.SIGTERM)
    stopped = call(tune, *order)
    assert stopped.returncode == 143, stopped
    assert "stage 1, epoch" not in stopped.stdout  # which was done before
    assert "stopped in trial 0; the same command continues the search" in stopped.stderr
    monkeypatch.setattr(train.Batches, "passes", passes)
    if (child := os.fork()) == 0:
        _be(tune, order, tmp_path / "other")
    here = succeeds(tune, *order, timeout=240)
    assert _wait(child, time.monotonic() + 240) == 0
    there = (tmp_path / "other.out").read_text()
    trained = [re.findall(r"trial (\d): python", text) for text in (here, there)]
    assert sorted(trained[0] + trained[1]) == ["0", "1", "2"]
    # As if it had never been stopped
    curve, whole = (
        next(row["curve"] for row in read_json(out / "trials.json") if row["trial"] == 0)
        for out in (tmp_path, tuned[0])
    )
    assert curve == whole
    assert not list(tmp_path.glob("*.lock"))


def test_a_trial_that_diverges_is_a_poor_one(tiny_data, tmp_path):
    printed = succeeds(tune, *search(tiny_data, tmp_path, 1), "--lr", "1e30")
    (row,) = read_json(tmp_path / "trials.json")
    assert row["state"] == "pruned"
    assert "trial 0: stage 1, epoch 1, step 2" in printed
    assert "No trial is complete yet." in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learning 1", "unrecognized arguments: --learning 1"),
        ("--epochs 0", "--epochs 0 0: expected at least one epoch"),
        ("--val-ids 1", "expected a whole number of at least 2"),
        ("--val-ids 4", "--val-ids 4: leaves too few of the 4 training identities"),
        ("--backbone-weights no.pth", "no.pth: no such file"),
    ],
)
def test_mistakes_give_one_line_and_leave_no_trace(tiny_data, tmp_path, words, message):
    assert message in fails(tune, *search(tiny_data, tmp_path / "out", 1), *words.split())
    assert not (tmp_path / "out").exists()


def test_torchrun_and_a_missing_optuna(tiny_data, tmp_path, monkeypatch):
    words = search(tiny_data, tmp_path, 1)
    assert "not torchrun" in fails(tune, *words, ranks=2)
    monkeypatch.setattr(tune, "optuna", None)
    assert "pip install optuna" in fails(tune, *words)


def test_what_is_searched_depends_on_what_is_in_use():
    def names(words: str) -> set[str]:
        return set(tune.searched(options.parse(words.split())))

    off = {"backbone_lr 1", "backbone_lr 2", "beta 1"}
    assert names("--dataset rgbnt100") == set(tune.SPACE) - off
    assert "backbone_lr 2" in names("--dataset rgbnt100 --backbone-lr 1e-5")
    assert "alpha" not in names("--alpha 0")
    assert not any(name.endswith(" 1") for name in names("--epochs 0 2"))
    assert "warmup_steps" not in names("--schedule constant")
    base = options.parse(["--recipe", "plus"])
    values = {name: 2 * value for name, value in tune.searched(base).items()}
    again = options.parse(["--recipe", "plus", *tune.words_of(base, values)])
    assert tune.searched(again) == values
