"""Pruning: which weights go, that they stay gone, what files hold, and that rounds resume."""

import pytest
import torch
from conftest import call, fails, read_json, read_log, run, succeeds

import evaluate
import options
import prune
import runtime
from model import GraFTConfig, build_model

SIZES = {"image_size": (32, 64), "num_ids": 7}
VIT = options.BACKBONES["small"]
RESNET = {"fusion": "hamnet", "backbone": "resnet18"}
TIMM = {"backbone": "timm:vit_tiny_patch16_224", "dim": 192, "depth": 12, "heads": 3}
SMALL = GraFTConfig(**SIZES, **VIT)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(SMALL).eval()


def features(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    images = {m: torch.randn(3, 3, 32, 64, generator=generator) for m in SMALL.modalities}
    with torch.no_grad():
        return model(images).fusion


# --- masks


def test_counts_by_hand(model):
    assert prune.num_prunable(model) == prune.num_kept(model) == 6 * 12 * 192**2
    three = GraFTConfig(**SIZES, **VIT, fusion="multistream")
    assert prune.num_prunable(build_model(three)) == 3 * 6 * 12 * 192**2


@pytest.mark.parametrize(("sizes", "kind", "count"), [
    (VIT, torch.nn.Linear, 6 * 4), (RESNET, torch.nn.Conv2d, 20), (TIMM, torch.nn.Linear, 12 * 4)
])  # fmt: skip
def test_the_largest_weights_of_all_the_backbones_layers_together_stay(sizes, kind, count):
    if sizes is TIMM:
        pytest.importorskip("timm")
    model = build_model(GraFTConfig(**SIZES, **sizes, modalities=("rgb",)))
    layers = prune.layers(model)
    assert [type(layer) for layer in layers.values()] == count * [kind]
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    prune.mask(model, 500_000)
    prune.make_permanent(model)
    every = torch.cat([weight.abs().flatten() for weight in before.values()])
    threshold = every.kthvalue(len(every) - 500_000 + 1).values
    for name, layer in layers.items():
        size, stays = before[name].abs(), layer.weight != 0
        assert torch.equal(stays, torch.where(size == threshold, stays, size > threshold))  # a tie
        assert torch.equal(layer.weight, before[name] * stays)
    assert prune.num_kept(model) == 500_000


def test_what_is_zero_stays_zero_and_goes_first(model):
    prune.mask(model, 2_000_000)
    prune.make_permanent(model)
    gone = {name: layer.weight == 0 for name, layer in prune.layers(model).items()}
    prune.mask(model, 1_500_000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for layer in prune.layers(model).values():  # momentum of weights that are masked
        layer.weight_orig.grad = torch.ones_like(layer.weight_orig)
    optimizer.step()
    features(model)  # makes the weights anew
    prune.make_permanent(model)
    assert prune.num_kept(model) == 1_500_000
    assert all((layer.weight[gone[name]] == 0).all() for name, layer in prune.layers(model).items())


# --- files


def test_packed_weights_are_whole_again_or_refused():
    weight = torch.tensor([[0.0, 1.5, 0.0], [-2.0, 0.0, 3.25]])
    packed = runtime.pack(weight)
    assert packed["mask"].tolist() == [0b01010100]
    assert packed["values"].tolist() == [1.5, -2.0, 3.25]
    assert torch.equal(runtime.unpack(packed), weight)
    with pytest.raises(ValueError, match="for"):
        runtime.unpack({**packed, "values": torch.ones(2)})


@pytest.mark.parametrize("half", [False, True])
def test_a_file_is_as_small_as_its_non_zero_weights(model, half, tmp_path):
    prune.mask(model, round(0.3 * prune.num_prunable(model)))
    prune.make_permanent(model)
    facts = dict.fromkeys(SMALL.modalities, (0.5, 0.5, 0.5))
    about = {"config": vars(SMALL), "settings": {}, "mean": facts, "std": facts}
    prune.write(tmp_path / "pruned.pt", model, about, half)
    limit = (2 if half else 4) * model.num_parameters(nonzero=True) + prune.num_prunable(model) / 8
    assert (tmp_path / "pruned.pt").stat().st_size <= 1.01 * limit + 64e3
    loaded, _ = evaluate.load_model(tmp_path / "pruned.pt")
    tolerance = 1e-2 if half else 0
    torch.testing.assert_close(features(loaded), features(model), rtol=tolerance, atol=tolerance)


# --- the program


def test_rounds_shrink_by_equal_factors():
    pruning = prune.Pruning({"rounds": 2}, {"0.64": 0.64, "0.16": 0.16}, start=1.0)
    assert pruning.fractions() == pytest.approx([0.8, 0.64, 0.32, 0.16])


QUICK = ["--rounds", 2, "--epoch-steps", 1, "--device", "cpu"]


@pytest.fixture(scope="module")
def pruned(trained, tmp_path_factory):
    """Folder of a run of prune.py on the tiny data set."""
    out = tmp_path_factory.mktemp("pruned")
    words = ["--keep", 0.5, 0.8, *QUICK, "--out", out]
    done = run("prune.py", trained, *words)
    assert done.returncode == 0, done.stderr
    assert "round 4 of 4, epoch 1 of 1" in done.stdout
    assert f"{out}/0.5.pt: 2.5" in done.stdout
    return out


def test_the_table_says_what_the_files_are(pruned, trained):
    rows = read_json(pruned / "results.json")["rows"]
    assert [row["label"] for row in rows] == ["start", "0.8", "0.5"]
    assert [row["kept"] for row in rows] == pytest.approx([1, 0.8, 0.5], abs=1e-5)
    for row in rows:
        file = pruned / f"{row['label']}.pt"
        assert row["bytes"] == file.stat().st_size
        succeeds(evaluate, file, "--json", pruned / "metrics.json")
        metrics = read_json(pruned / "metrics.json")
        assert {name: row[name] for name in ("mAP", "R1", "R5", "R10")}.items() <= metrics.items()
    assert rows[0]["mAP"] == read_json(trained / "metrics.json")["mAP"]


@pytest.mark.parametrize("more", ["", "--structured --half"])
def test_resumed_after_any_round_it_ends_the_same(trained, tmp_path, monkeypatch, more):
    words = ["--keep", 0.5, 0.8, *QUICK, *more.split()]
    whole, ended = tmp_path / "whole", tmp_path / "ended"  # of one length, as files hold the path
    succeeds(prune, trained, *words, "--out", whole)
    once, calls = prune.prune_once, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        once(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prune, "prune_once", interrupted)
        assert call(prune, trained, *words, "--out", ended).returncode == 130
    assert read_json(ended / "results.json")["rounds"] == 2
    succeeds(prune, trained, "--out", ended, "--resume", "--device", "cpu")
    ends = [runtime.load_checkpoint(out)["model"] for out in (whole, ended)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())
    rows = [read_json(out / "results.json")["rows"] for out in (whole, ended)]
    assert rows[0] == rows[1]
    assert len(read_log(ended, "epoch")) == 4


def test_a_round_warms_up_for_a_tenth_of_its_own_steps(trained, tmp_path):
    """Not for a whole stage's 30, of which 4 would never reach the rate."""
    words = ["--keep", 0.9, "--rounds", 1, "--epoch-steps", 4, "--lr", 1e-3]
    succeeds(prune, trained, *words, "--schedule", "cosine", "--out", tmp_path)
    assert read_log(tmp_path, "step")[0]["lr"] == 1e-3


@pytest.mark.parametrize(("words", "message"), [
    ("", "expected targets, e.g. --params 76M 60M or --keep 0.69 0.5"),
    ("--keep 1.2", "1.2: would leave 1.2 of the prunable weights; expected more than 0 and less"),
    ("--params 0.1M", "0.1M: would leave -0."),
    ("--keep 0.1 --structured", "expected more than 0.125 and less than 1"),
    ("--params 2MM", "2MM: expected a target such as 76M"),
])  # fmt: skip
def test_mistakes_give_one_line(trained, tmp_path, words, message):
    assert message in fails(prune, trained, *words.split(), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_occupied_folder_is_kept(trained, pruned, tmp_path):
    half, words = pruned / "0.5.pt", ["--keep", 0.6, "--out"]
    assert "less than 0.5" in fails(prune, half, *words, tmp_path)
    assert "holds a run already" in fails(prune, trained, *words, pruned)
    assert "has ['0.5', '0.8']; leave" in fails(prune, trained, *words, pruned, "--resume")
    line = fails(prune, half, "--out", pruned, "--resume")
    assert "holds a pruning of another checkpoint" in line
    line = fails(prune, trained, *words, trained, "--resume")
    assert "can be evaluated but not pruned; expected a checkpoint as prune.py writes it" in line
