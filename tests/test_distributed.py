"""One recipe for any number of ranks.

Processes that share a step do what one does with all of it.
"""

import itertools
import json
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, call, run, tiny_arguments, torchrun

import evaluate
import losses
import prune
import runtime
import train
from model import GraFTConfig, SyncBatchNorm1d, build_model

B = 9  # triplets of a step: no number of ranks divides them


def make_objective(scheme: str) -> train.Objective:
    torch.manual_seed(0)
    size = dict(image_size=(16, 32), dim=32, depth=2, heads=2, encoder_heads=4, encoder_hidden=48)
    config = GraFTConfig(**size, num_ids=5, dropout=0.0)
    facts = dict.fromkeys(config.modalities, (0.5, 0.5, 0.5))
    model = build_model(config)
    embedder = evaluate.Embedder(model, facts, facts, torch.device("cpu"), "fp32")
    heads = config.modalities if scheme == "hardest" else ()  # with --modality-losses, too
    criterion = losses.GraFTLoss(5, 32, scheme, modalities=heads)
    objective = train.Objective(embedder, criterion)
    objective.criterion.weights(alpha=0.5, beta=0.0005, gamma=0.5, label_smoothing=0.1)
    torch.nn.init.normal_(model.classifier.weight)  # so that gradients through BatchNorm count
    return objective


def make_batch(share: slice):
    """Some triplets of a fixed batch: anchors, positives, negatives; labels of all."""
    generator = torch.Generator().manual_seed(1)
    shape = (3, B, 3, 16, 32)
    images = {m: torch.randn(shape, generator=generator) for m in ("rgb", "nir", "tir")}
    anchors = torch.arange(B) % 5
    labels = torch.stack([anchors, anchors, (anchors + 1) % 5])
    part = {modality: image[:, share].flatten(0, 1) for modality, image in images.items()}
    return part, labels[:, share].flatten()


def backward(objective: train.Objective, scheme: str, ranks: int) -> dict:
    """A step as train_stage takes it, in one pass or, with FFD, in several."""
    parallel = train.on_all_ranks(objective)
    per_pass = 2 if scheme == "hardest" and ranks > 1 else 26
    shares = train.data.share_out(B, per_pass if scheme != "hardest" else 26, ranks)
    total = 0.0
    for part, row in enumerate(shares):
        share = row[runtime.rank()]
        images, labels = make_batch(share)
        n = share.stop - share.start
        labels = labels if scheme == "hardest" else labels[:n]
        rows = tuple(3 * (s.stop - s.start) for s in row)
        weight = n * ranks / B
        with train.gradients_sent(parallel, part == len(shares) - 1):
            result = parallel(images, labels, rows)
            (result["loss"] * weight).backward()
        total += result["loss"].detach() * weight
    mean = runtime.all_sum(total) / ranks
    gradients = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
    return {"loss": mean, "gradients": gradients}


class Program:
    """A program for `call`: the same step on every rank, and unequal parts through BatchNorm."""

    __name__ = "step"

    def __init__(self, folder):
        self.folder = folder

    def main(self) -> None:
        runtime.start("cpu")
        rank, ranks = runtime.rank(), runtime.world_size()
        results = {s: backward(make_objective(s), s, ranks) for s in ("FFD", "hardest")}
        norm = SyncBatchNorm1d(4)
        torch.manual_seed(rank)
        norm(torch.randn(1 + rank, 4))  # rank 0 holds a single sample
        results |= {"mean": norm.running_mean, "var": norm.running_var}
        torch.save(results, self.folder / f"{rank}.pt")
        runtime.leave_ranks()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    done = call(Program(folder), ranks=request.param)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("scheme", ["FFD", "hardest"])
def test_gradients_are_those_of_one_process_with_the_whole_step(ranks, scheme):
    """Also where triplets are mined over all ranks' samples, and ranks hold unequal parts."""
    expected = backward(make_objective(scheme), scheme, 1)
    # all but BatchNorms' frozen bias
    frozen = 4 if scheme == "hardest" else 1
    assert len(expected["gradients"]) == len(list(make_objective(scheme).parameters())) - frozen
    for result in ranks:
        torch.testing.assert_close(result[scheme]["loss"], expected["loss"], atol=1e-5, rtol=0)
        for name, gradient in expected["gradients"].items():
            found = result[scheme]["gradients"][name]
            torch.testing.assert_close(found, gradient, atol=1e-5, rtol=1e-5, msg=name)


def test_batchnorm_of_unequal_parts_is_that_of_the_whole(ranks):
    parts = []
    for rank in range(len(ranks)):
        torch.manual_seed(rank)
        parts.append(torch.randn(1 + rank, 4))
    reference = torch.nn.BatchNorm1d(4)
    reference(torch.cat(parts))
    for result in ranks:
        torch.testing.assert_close(result["mean"], reference.running_mean)
        torch.testing.assert_close(result["var"], reference.running_var)


# --- whole runs


def steps_of(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "step"]


def assert_same_losses(a, b, abs=1e-4):
    assert len(a) == len(b) > 0
    for one, other in zip(a, b, strict=True):
        assert one["lr"] == other["lr"]
        for name in ("loss", "triplet", "center", "cross_entropy", "modality"):
            if name not in one:
                continue
            assert other[name] == pytest.approx(one[name], abs=abs), (one, other)


QUICK = ["--dropout", 0, "--epochs", 1, 1, "--log-every", 1, "--lr", 2e-4, 1e-4]
RECIPES = {
    "paper": ["--modality-dropout", 0.3],
    "plus": [
        "--recipe",
        "plus",
        "--schedule",
        "cosine",
        "cosine",
        "--patch-dropout",
        0,
        0,
        "--modality-losses",
        1,
    ],
}


@pytest.fixture(scope="module", params=RECIPES)
def alone(request, tiny_data, tmp_path_factory):
    """A recipe's options, and its run on one rank."""
    out, more = tmp_path_factory.mktemp("alone") / "run", [*QUICK, *RECIPES[request.param]]
    done = call(train, *tiny_arguments(tiny_data, out), *more)
    assert done.returncode == 0, done.stderr
    assert "a step: 8 triplets in 1 pass, 8 on 1 rank(s); 8 + 8 steps, 128 triplets" in done.stdout
    return more, out


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_any_number_of_ranks_trains_and_evaluates_as_one(alone, tiny_data, tmp_path, ranks):
    more, out = alone
    streamed = ["--store", 0, "--workers", 1] if ranks == 4 else []  # else by the decoded store
    done = call(train, *tiny_arguments(tiny_data, tmp_path), *more, *streamed, ranks=ranks)
    assert done.returncode == 0, done.stderr
    shown = " + ".join([str(8 // ranks)] * ranks)
    assert f"a step: 8 triplets in 1 pass, {shown} on {ranks} rank(s); 8 + 8 steps" in done.stdout
    assert done.stdout.count("stage 2 epoch 1/1") == 1  # rank 0 alone speaks
    assert_same_losses(steps_of(out), steps_of(tmp_path))
    a, b = (json.loads((folder / "metrics.json").read_text()) for folder in (out, tmp_path))
    assert a["num_valid"] == b["num_valid"]
    done = call(evaluate, tmp_path / "last.pt", "--json", tmp_path / "one.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "one.json").read_text()) == pytest.approx(b, abs=0.02)


def test_several_passes_make_the_same_step(tiny_data, tmp_path):
    """Without cross-entropy, whose BatchNorm sees one pass at a time, nothing else may differ."""
    plain = [*QUICK, "--gamma", 0, "--triplet", "FFF", "--beta", 0.001, 0.001]
    for name, more in (("one", []), ("three", ["--per-pass", 3])):
        done = call(train, *tiny_arguments(tiny_data, tmp_path / name), *plain, *more)
        assert done.returncode == 0, done.stderr
    assert "in 3 passes, BatchNorm sees one at a time" in done.stdout
    one, three = steps_of(tmp_path / "one"), steps_of(tmp_path / "three")
    for a, b in zip(one, three, strict=True):
        for name in ("triplet", "center"):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_resumed_on_another_number_of_ranks_it_is_the_same_run(
    alone, tiny_data, tmp_path, before, after
):
    """Stopped in the middle of stage 2's epoch by a signal to one rank only."""
    more, out = alone
    arguments = [*tiny_arguments(tiny_data, tmp_path), *more]
    done = call(StoppedAt(2, 5), *arguments, ranks=before)
    assert done.returncode == 143, done.stderr
    assert "stopped after stage 2, epoch 1, step 5 of 8" in done.stderr
    done = call(train, *arguments, "--resume", ranks=after)
    assert done.returncode == 0, done.stderr
    assert_same_losses(steps_of(out), steps_of(tmp_path))
    last = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][-2]
    assert last["event"] == "epoch" and last["triplets_per_second"] > 0


class StoppedAt:
    """train.py, whose last rank gets a SIGTERM in a step of a stage."""

    __name__ = "train"

    def __init__(self, stage: int, step: int):
        self.place = (stage, step)

    def main(self) -> None:
        status = train.status
        calls = itertools.count(1)

        def signalled(sums, optimizer):
            current = next(calls)
            is_due = current == 8 * (self.place[0] - 1) + self.place[1]
            if is_due and runtime.rank() == runtime.world_size() - 1:
                signal.raise_signal(signal.SIGTERM)
            return status(sums, optimizer)

        train.status = signalled
        train.main()


def test_the_users_command_by_torchrun(tiny_data, tmp_path):
    short = ["--epochs", 1, 1, "--epoch-steps", 2, 2]
    done = torchrun(2, "train.py", *tiny_arguments(tiny_data, tmp_path), *short)
    assert done.returncode == 0, done.stderr
    command = ["evaluate.py", tmp_path / "last.pt", "--json", tmp_path / "two.json"]
    done = torchrun(2, *command)
    assert done.returncode == 0, done.stderr
    assert run("evaluate.py", tmp_path / "last.pt", "--json", tmp_path / "one.json").returncode == 0
    figures = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    assert figures[0] == pytest.approx(figures[1], abs=1e-4)


def test_a_mistake_ends_all_ranks(tiny_data, tmp_path):
    arguments = tiny_arguments(tiny_data, tmp_path / "out")
    done = call(train, *arguments, "--batch-size", 65, ranks=2)
    assert done.returncode == 2 and "an epoch has only 64 triplets" in done.stderr
    assert not (tmp_path / "out").exists()
    done = call(train, *arguments, "--batch-size", 3, ranks=4)
    assert done.returncode == 2 and "fewer triplets than the 4 ranks" in done.stderr


def test_one_ranks_failure_is_one_line_and_no_traceback(tiny_data, tmp_path):
    """A rank that cannot read a file ends; the other, which waits for it, says so."""

    class OneCannotRead:
        __name__ = "train"

        def main(self) -> None:
            read = train.data.read_batches

            def failing(*arguments):
                batches = read(*arguments)
                yield next(batches)
                if runtime.rank() == 1:
                    raise runtime.UserError("photo.jpg: not an image that can be read")
                yield from batches

            train.data.read_batches = failing
            train.main()

    done = call(OneCannotRead(), *tiny_arguments(tiny_data, tmp_path), ranks=2)
    assert "error: photo.jpg: not an image" in done.stderr and "Traceback" not in done.stderr
    assert "rank 0: another rank failed" in done.stderr


def test_gradients_are_sent_and_nothing_else(tmp_path):
    """DistributedDataParallel would send BatchNorm's figures and pruning's masks in each pass."""

    class Counting:
        __name__ = "step"

        def main(self) -> None:
            runtime.start("cpu")
            objective = make_objective("FFD")
            prune.mask(objective.model, prune.prunable(objective.model) // 2)
            parallel = train.on_all_ranks(objective)
            images, labels = make_batch(slice(0, 4))
            sent = []
            for name in ("broadcast", "allreduce"):
                operation = getattr(torch.distributed.ProcessGroup, name)

                def counted(group, tensors, *options, operation=operation):
                    sent.append(sum(t.nbytes for t in tensors))
                    return operation(group, tensors, *options)

                setattr(torch.distributed.ProcessGroup, name, counted)
            hooked = []

            def hook(state, bucket):
                hooked.append(bucket.buffer().nbytes)
                future = torch.futures.Future()
                future.set_result(bucket.buffer())
                return future

            parallel.register_comm_hook(None, hook)
            parallel(images, labels[:4], (12, 12))["loss"].backward()
            gradients = sum(p.grad.nbytes for p in objective.parameters() if p.grad is not None)
            result = {"hooked": sum(hooked), "other": sum(sent), "gradients": gradients}
            result["buffers"] = parallel.will_sync_module_buffers()
            if runtime.rank() == 0:
                (tmp_path / "bytes.json").write_text(json.dumps(result))
            runtime.leave_ranks()

    done = call(Counting(), ranks=2)
    assert done.returncode == 0, done.stderr
    counted = json.loads((tmp_path / "bytes.json").read_text())
    assert counted["hooked"] == counted["gradients"] > 0
    assert not counted["buffers"] and counted["other"] > 0  # BatchNorm's sums, there and back
    assert counted["hooked"] + counted["other"] <= 1.01 * counted["gradients"]
    assert "Warning" not in done.stderr


def test_torchrun_does_not_take_another_run_for_its_own(trained, tiny_data):
    """An occupied folder is refused by a restarted attempt, too."""
    before = (trained / "last.pt").read_bytes()
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--max-restarts",
        "1",
    ]
    program = ["--nproc_per_node=1", "train.py", *tiny_arguments(tiny_data, trained)]
    done = subprocess.run(
        [*launcher, *map(str, program)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode != 0 and done.stderr.count("holds a run already") == 2
    assert (trained / "last.pt").read_bytes() == before


def test_pruning_on_two_ranks_keeps_the_same_weights(trained, tmp_path):
    class Spy:
        __name__ = "prune"

        def main(self) -> None:
            permanent = prune.make_permanent

            def spy(model):
                permanent(model)
                weights = {name: layer.weight.data for name, layer in prune.layers(model).items()}
                torch.save(weights, tmp_path / f"rank{runtime.rank()}.pt")

            prune.make_permanent = spy
            prune.main()

    quick = ["--keep", 0.5, "--rounds", 1, "--epoch-steps", 1, "--device", "cpu"]
    done = call(Spy(), trained / "last.pt", *quick, "--out", tmp_path / "out", ranks=2)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert sum(int(w.count_nonzero()) for w in first.values()) == 6 * 12 * 192**2 // 2
