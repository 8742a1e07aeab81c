"""One recipe for any number of ranks.

Processes that share a step do what one does with all of it.
"""

import signal
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import call, read_json, read_log, succeeds, tiny_arguments, torchrun
from test_faults import altered, signalled

import data
import evaluate
import losses
import options
import runtime
import train
from model import GraFTConfig, SyncBatchNorm1d, build_model

B = 9  # triplets of a step: no number of ranks divides them


@pytest.fixture(scope="module", autouse=True)
def no_dropout():
    """Its draws differ by rank."""
    with mock.patch.dict(options.CONSTANTS, dropout=0.0):
        yield


SCHEMES = ("FFD", "hardest", "contrastive")  # the last with the hardest triplets, too


def make_objective(scheme: str) -> train.Objective:
    torch.manual_seed(0)
    size = dict(image_size=(16, 32), dim=32, depth=2, heads=2, encoder_heads=4, encoder_hidden=48)
    fusion = "weighted" if scheme == "contrastive" else "graft"
    config = GraFTConfig(**size, fusion=fusion, num_ids=5, dropout=0.0)
    facts = dict.fromkeys(config.modalities, (0.5, 0.5, 0.5))
    model = build_model(config)
    features = "bnneck" if fusion == "weighted" else "fusion"
    device = torch.device("cpu")
    embedder = evaluate.Embedder(model, facts, facts, device, "fp32", features=features)
    criterion = losses.GraFTLoss(5, 32, "hardest" if scheme == "contrastive" else scheme)
    beta = 0.0 if fusion == "weighted" else 0.0005
    criterion.set_weights(alpha=0.5, beta=beta, gamma=0.5, label_smoothing=0.1)
    for layer in model.classifier.modules():
        if isinstance(layer, torch.nn.Linear):  # so that gradients through BatchNorm count
            torch.nn.init.normal_(layer.weight)
    return train.Objective(embedder, criterion)


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
    """A step as train_epoch takes it."""
    parallel = train.on_all_ranks(objective)
    (shares,) = data.share_out(B, 26, ranks)
    share = shares[runtime.rank()]
    images, labels = make_batch(share)
    n = share.stop - share.start
    labels = labels[:n] if scheme == "FFD" else labels
    loss = parallel(images, labels, tuple(3 * (s.stop - s.start) for s in shares))["loss"]
    loss = loss * n * ranks / B
    loss.backward()
    mean = runtime.all_sum(loss.detach()) / ranks
    gradients = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
    return {"loss": mean, "gradients": gradients}


@pytest.fixture(scope="module", params=[2, 4, 8])
def ranks(request, tmp_path_factory):
    """What the ranks computed: the same step, and unequal parts through BatchNorm."""
    folder = tmp_path_factory.mktemp("ranks")

    def main() -> None:
        runtime.start("cpu")
        rank, ranks = runtime.rank(), runtime.world_size()
        results = {s: backward(make_objective(s), s, ranks) for s in SCHEMES}
        norm = SyncBatchNorm1d(4)
        torch.manual_seed(rank)
        norm(torch.randn(1 + rank, 4))  # rank 0 holds a single sample
        results |= {"mean": norm.running_mean, "var": norm.running_var}
        parallel = train.on_all_ranks(make_objective("FFD"))
        results["buffers"] = parallel.will_sync_module_buffers()
        torch.save(results, folder / f"{rank}.pt")
        runtime.leave_ranks()

    succeeds(SimpleNamespace(__name__="step", main=main), ranks=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_those_of_one_process_with_the_whole_step(ranks, scheme):
    """Also where triplets are mined over all ranks' samples, and ranks hold unequal parts."""
    expected = backward(make_objective(scheme), scheme, 1)
    trained = [p for p in make_objective(scheme).parameters() if p.requires_grad]
    assert len(expected["gradients"]) == len(trained)
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


def test_gradients_are_sent_and_nothing_else(ranks):
    """DistributedDataParallel would send BatchNorm's figures and pruning's masks in each pass."""
    assert not any(result["buffers"] for result in ranks)


# --- whole runs. Many steps of two right runs drift apart by rounding (a ReLU tips, Adam divides by
#     a tiny root), so their losses are compared by a relative bound; that a triplet of wrong weight
#     breaks it is shown below

QUICK = "--epochs 1 --lr 2e-4 1e-4"
RECIPES = {
    "paper": QUICK,
    "plus": f"{QUICK} --recipe plus --schedule cosine --patch-dropout 0 --epoch-steps 8",
}
TOLERANCE = 2e-3  # relative, of a step's loss and gradient norm


def drift(a: list[dict], b: list[dict]) -> float:
    """The largest relative difference of losses between two runs' steps."""
    assert len(a) == len(b) == 16
    names = [n for n in ("loss", "cross_entropy", "center", "contrastive") if n in a[0]]
    return max(
        abs(x[name] - y[name]) / max(abs(x[name]), 0.1)
        for x, y in zip(a, b, strict=True)
        for name in names
    )


@pytest.fixture(scope="module", params=RECIPES)
def alone(request, tiny_data, tmp_path_factory):
    """A recipe's options, and its run on one rank."""
    out, more = tmp_path_factory.mktemp("alone") / "run", RECIPES[request.param].split()
    succeeds(train, *tiny_arguments(tiny_data, out), *more)
    return more, out


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_trains_and_evaluates_as_one(alone, tiny_data, tmp_path, ranks):
    more, out = alone
    streamed = ["--store", 0, "--workers", 1] if ranks == 4 else []  # else by the decoded store
    stdout = succeeds(train, *tiny_arguments(tiny_data, tmp_path), *more, *streamed, ranks=ranks)
    assert stdout.count("stage 2, epoch 1 of 1") == 1  # rank 0 alone speaks
    assert drift(read_log(out, "step"), read_log(tmp_path, "step")) < TOLERANCE
    succeeds(evaluate, tmp_path, "--json", tmp_path / "one.json")
    one, several = read_json(tmp_path / "one.json"), read_json(tmp_path / "metrics.json")
    assert one["mAP"] == pytest.approx(several["mAP"], abs=0.02)
    assert one["num_valid"] == several["num_valid"] == 24


def test_a_triplet_of_wrong_weight_would_break_the_bound(tiny_data, tmp_path):
    """Two ranks with 5 and 4 of 9 triplets, one of which counts its own as if they were 4."""
    passes = train.Batches.passes

    def misweighted(*arguments):
        for batch in passes(*arguments):
            scale = 4 / 5 if runtime.rank() == 0 else 1.0
            yield batch._replace(weight=batch.weight * scale)

    wrongly = altered(lambda: setattr(train.Batches, "passes", misweighted))
    words = f"{QUICK} --batch-size 9 --epochs 0 1 --epoch-steps 5".split()
    steps = []
    for name, program, ranks in (("one", train, 1), ("two", train, 2), ("wrong", wrongly, 2)):
        succeeds(program, *tiny_arguments(tiny_data, tmp_path / name), *words, ranks=ranks)
        steps.append([line["gradient_norm"] for line in read_log(tmp_path / name, "step")])
    one, two, wrong = (torch.tensor(norms) for norms in steps)
    assert ((one - two).abs() / one).max() < TOLERANCE
    assert ((one - wrong).abs() / one).min() > 5 * TOLERANCE


def test_several_passes_make_the_same_step(tiny_data, tmp_path):
    """Without cross-entropy, whose BatchNorm sees one pass at a time, nothing else may differ."""
    plain = f"{QUICK} --gamma 0 --triplet FFF --beta 0.001 --epochs 0 1 --epoch-steps 5"
    steps = []
    for per_pass, ranks in ((26, 1), (3, 1), (2, 2)):
        out = tmp_path / str(per_pass)
        words = [*plain.split(), "--per-pass", per_pass]
        succeeds(train, *tiny_arguments(tiny_data, out), *words, ranks=ranks)
        steps.append(read_log(out, "step"))
    for whole, *others in zip(*steps, strict=True):
        for other in others:
            for name in ("triplet", "center", "gradient_norm"):
                assert other[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_resumed_on_another_number_of_ranks_it_is_the_same_run(
    alone, tiny_data, tmp_path, before, after
):
    """Stopped in the middle of stage 2's epoch by a signal to one rank only."""
    more, out = alone
    words = [*tiny_arguments(tiny_data, tmp_path), *more]
    done = call(signalled(13, signal.SIGTERM), *words, ranks=before)
    assert done.returncode == 143, done.stderr
    assert "stopped after stage 2, epoch 1, step 5 of 8" in done.stderr
    succeeds(train, *words, "--resume", ranks=after)
    assert drift(read_log(out, "step"), read_log(tmp_path, "step")) < TOLERANCE


def test_the_users_command_by_torchrun(tiny_data, tmp_path):
    words = [*tiny_arguments(tiny_data, tmp_path), "--epochs", 1, "--epoch-steps", 2]
    done = torchrun(2, "train.py", *words)
    assert done.returncode == 0, done.stderr
    succeeds(evaluate, tmp_path, "--json", tmp_path / "one.json")
    one, two = read_json(tmp_path / "one.json"), read_json(tmp_path / "metrics.json")
    assert one["mAP"] == pytest.approx(two["mAP"], abs=1e-4)


def test_a_mistake_ends_all_ranks(tiny_data, tmp_path):
    words = tiny_arguments(tiny_data, tmp_path / "out")
    for batch_size, ranks, message in (
        (65, 2, "an epoch has only 64 triplets"),
        (3, 4, "fewer triplets than the 4 ranks"),
    ):
        done = call(train, *words, "--batch-size", batch_size, ranks=ranks)
        assert done.returncode == 2
        assert message in done.stderr
        assert not (tmp_path / "out").exists()


def test_one_ranks_failure_is_one_line_and_no_traceback(tiny_data, tmp_path):
    """A rank that cannot read a file ends; the other, which waits for it, says so."""
    read = data.read_batches

    def failing(*arguments):
        batches = read(*arguments)
        yield next(batches)
        if runtime.rank() == 1:
            raise runtime.UserError("photo.jpg: not an image that can be read")
        yield from batches

    program = altered(lambda: setattr(data, "read_batches", failing))
    done = call(program, *tiny_arguments(tiny_data, tmp_path), ranks=2)
    assert "error: photo.jpg: not an image" in done.stderr
    assert "Traceback" not in done.stderr
    assert "rank 0: another rank failed" in done.stderr
