"""Pruning: which weights go, that they stay gone, and what files hold.

Also that removed groups were removed, and nothing else.
"""

import json
import sys

import pytest
import torch
from conftest import run

import evaluate
import prune
import runtime
from model import BACKBONES, GraFTConfig, build_model
from runtime import UserError

SMALL = GraFTConfig(image_size=(32, 64), num_ids=7, **BACKBONES["small"])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(SMALL).eval()


def features(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(
            {m: torch.randn(3, 3, 32, 64, generator=generator) for m in SMALL.modalities}
        ).fusion


def test_counts_by_hand(model):
    assert len(prune.layers(model)) == 6 * 4 and not any(
        "encoders" in name for name in prune.layers(model)
    )
    assert prune.prunable(model) == prune.kept(model) == 6 * 12 * 192**2
    three = build_model(
        GraFTConfig(image_size=(32, 64), fusion="multistream", **BACKBONES["small"])
    )
    assert prune.prunable(three) == prune.kept(three) == 3 * 6 * 12 * 192**2


def test_the_largest_weights_of_all_layers_together_stay(model):
    before = {name: layer.weight.detach().clone() for name, layer in prune.layers(model).items()}
    prune.mask(model, 1_000_000)
    prune.make_permanent(model)
    threshold = (
        torch.cat([weight.abs().flatten() for weight in before.values()])
        .sort(descending=True)
        .values[1_000_000 - 1]
    )
    for name, layer in prune.layers(model).items():
        assert torch.equal(
            layer.weight, torch.where(before[name].abs() >= threshold, before[name], 0)
        )
    assert prune.kept(model) == 1_000_000
    shares = prune.sparsity(model)
    q, k, v = before["backbone.blocks.2.attn.qkv"].chunk(3)
    assert len(shares) == 6 * 6
    for part, weight in (("q", q), ("k", k), ("v", v)):
        assert shares[f"backbone.blocks.2.attn.{part}"] == pytest.approx(
            (weight.abs() < threshold).float().mean().item()
        )


def test_what_is_zero_stays_zero_and_goes_first(model):
    prune.mask(model, 2_000_000)
    prune.make_permanent(model)
    gone = {name: layer.weight == 0 for name, layer in prune.layers(model).items()}
    prune.mask(model, 1_500_000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for layer in prune.layers(model).values():  # momentum of weights that are masked
        layer.weight_orig.grad = torch.ones_like(layer.weight_orig)
    optimizer.step()
    for _ in range(3):
        images = {m: torch.randn(4, 3, 32, 64) for m in SMALL.modalities}
        model(images).fusion.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model({m: torch.randn(1, 3, 32, 64) for m in SMALL.modalities})
    assert prune.kept(model) == 1_500_000
    prune.make_permanent(model)
    assert prune.kept(model) == 1_500_000
    assert all((layer.weight[gone[name]] == 0).all() for name, layer in prune.layers(model).items())


def test_packed_weights_are_whole_again_or_refused():
    weight = torch.tensor([[0.0, 1.5, 0.0], [-2.0, 0.0, 3.25]])
    packed = runtime.pack(weight)
    assert packed["mask"].tolist() == [0b01010100 | 0b1 << 2] and packed["values"].tolist() == [
        1.5,
        -2.0,
        3.25,
    ]
    assert torch.equal(runtime.unpack(packed), weight)
    assert torch.equal(runtime.unpack(runtime.pack(torch.zeros(5, 3))), torch.zeros(5, 3))
    for damaged in ({**packed, "shape": (3, 3)}, {**packed, "values": torch.ones(2)}):
        with pytest.raises(ValueError, match="for"):
            runtime.unpack(damaged)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("keep", [0.69, 0.5, 0.14])
def test_a_file_is_as_small_as_its_non_zero_weights(model, keep, half, tmp_path):
    prune.mask(model, round(keep * prune.prunable(model)))
    prune.make_permanent(model)
    facts = dict.fromkeys(SMALL.modalities, (0.5, 0.5, 0.5))
    about = {"config": vars(SMALL), "settings": {}, "mean": facts, "std": facts}
    prune.write(tmp_path / "pruned.pt", model, about, half)
    limit = (2 if half else 4) * model.num_parameters(nonzero=True) + prune.prunable(model) / 8
    assert (tmp_path / "pruned.pt").stat().st_size <= 1.01 * limit + 64e3
    loaded, _ = evaluate.load_model(tmp_path / "pruned.pt")
    assert prune.kept(loaded) <= prune.kept(model)
    if half:
        torch.testing.assert_close(features(loaded), features(model), rtol=1e-2, atol=1e-2)
    else:
        assert torch.equal(features(loaded), features(model))


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.13])
def test_a_smaller_model_computes_what_the_large_one_does_without_the_removed_groups(model, keep):
    smaller = prune.shrink(model, round(keep * prune.prunable(model))).eval()
    assert prune.kept(smaller) == pytest.approx(keep * prune.prunable(model), rel=0.1)
    again = prune.shrink(smaller, 0)
    assert again.config.blocks == ((1, prune.CHANNELS),) * 6 and prune.prunable(
        again
    ) == prune.prunable(model)
    d = 192 // 3
    for large, small, (num_heads, num_channels) in zip(
        model.backbone.blocks, smaller.backbone.blocks, smaller.config.blocks, strict=True
    ):
        assert (
            small.attn.heads == num_heads >= 1
            and num_channels % prune.CHANNELS == 0
            and num_channels > 0
        )
        qkv, proj = (
            large.attn.qkv.weight.data.view(3, 3, d, 192),
            large.attn.proj.weight.data.view(192, 3, d),
        )
        head_norms = torch.stack([qkv[:, h].norm() ** 2 + proj[:, h].norm() ** 2 for h in range(3)])
        proj[:, head_norms.argsort()[: 3 - num_heads]] = 0
        channel_norms = (
            large.mlp.fc1.weight.norm(dim=1) ** 2 + large.mlp.fc2.weight.norm(dim=0) ** 2
        )
        large.mlp.fc2.weight.data[:, channel_norms.argsort()[: 768 - num_channels]] = 0
    torch.testing.assert_close(features(smaller), features(model), rtol=1e-4, atol=1e-5)


def test_rounds_shrink_by_equal_factors():
    pruning = prune.Pruning({}, {"0.64": 0.64, "0.16": 0.16}, start=1.0)
    assert pruning.fractions(2) == pytest.approx([0.8, 0.64, 0.32, 0.16])


# --- the program


def command(trained, out, *more) -> list:
    quick = ["--rounds", 2, "--epoch-steps", 1, "--device", "cpu"]
    return [trained / "last.pt", "--keep", 0.5, 0.8, *quick, "--out", out, *more]


@pytest.fixture(scope="module")
def pruned(trained, tmp_path_factory):
    """Folder of a run of prune.py on the tiny data set."""
    out = tmp_path_factory.mktemp("pruned")
    done = run("prune.py", *command(trained, out, "--chart", out / "size.png"))
    assert done.returncode == 0, done.stderr
    (out / "stdout.txt").write_text(done.stdout)
    return out


def rows(out) -> list[dict]:
    """The table without its times."""
    return [
        {**row, "samples_per_second": 0}
        for row in json.loads((out / "results.json").read_text())["rows"]
    ]


def test_the_table_says_what_the_files_are(pruned, trained):
    table = rows(pruned)
    assert [row["label"] for row in table] == ["start", "0.8", "0.5"]
    assert [row["kept"] for row in table] == pytest.approx([1, 0.8, 0.5], abs=1e-5)
    for row in table:
        file = pruned / f"{row['label']}.pt"
        done = run("evaluate.py", file, "--json", pruned / "metrics.json")
        assert done.returncode == 0, done.stderr
        metrics = json.loads((pruned / "metrics.json").read_text())
        assert {name: row[name] for name in ("mAP", "R1", "R5", "R10")}.items() <= metrics.items()
        assert row["bytes"] == file.stat().st_size
    assert table[0]["mAP"] == json.loads((trained / "metrics.json").read_text())["mAP"]
    printed = [
        line for line in (pruned / "stdout.txt").read_text().splitlines() if line.startswith("|")
    ]
    assert len(printed) == 2 + 3 + 2 + 36 and printed[4].startswith("| 0.5 | 2.5")
    assert (pruned / "size.png").stat().st_size > 1000


@pytest.mark.parametrize("structured", [False, True])
def test_resumed_after_any_round_it_ends_the_same(trained, tmp_path, monkeypatch, structured):
    options = ["--structured"] if structured else []
    monkeypatch.setattr(prune, "speed", lambda *given: 1.0)
    finetune, ends = prune.finetune, {}
    for name, stop in (("whole", 0), ("ended", 3)):  # paths of one length, as files hold them
        calls = []

        def interrupted(*arguments, stop=stop, calls=calls):
            calls.append(arguments)
            if len(calls) == stop:
                raise KeyboardInterrupt
            finetune(*arguments)

        monkeypatch.setattr(prune, "finetune", interrupted)
        for more in ([], ["--resume"]):
            monkeypatch.setattr(
                sys,
                "argv",
                ["prune.py", *map(str, command(trained, tmp_path / name, *options, *more))],
            )
            with pytest.raises(SystemExit):
                prune.main()
        assert len(calls) == (4 if name == "whole" else 5)
        ends[name] = runtime.load_checkpoint(tmp_path / name / "last.pt")["model"]
    assert rows(tmp_path / "whole") == rows(tmp_path / "ended")
    assert all(torch.equal(weight, ends["ended"][name]) for name, weight in ends["whole"].items())


def test_a_checkpoint_of_fewer_settings_is_pruned(trained, tmp_path):
    checkpoint = runtime.load_checkpoint(trained / "last.pt")
    del checkpoint["settings"]["checkpoint_every"], checkpoint["settings"]["patch_dropout"]
    runtime.save_checkpoint(tmp_path / "last.pt", checkpoint)
    quick = ["--rounds", 1, "--epoch-steps", 1, "--device", "cpu"]
    done = run(
        "prune.py", tmp_path / "last.pt", "--keep", 0.5, *quick, "--out", tmp_path / "pruned"
    )
    assert done.returncode == 0 and (tmp_path / "pruned/0.5.pt").exists(), done.stderr


def test_a_round_warms_up_for_a_tenth_of_its_own_steps(trained, tmp_path):
    """Not for a whole stage's 30, of which 4 would never reach the rate."""
    options = ["--keep", 0.9, "--rounds", 1, "--epoch-steps", 4, "--lr", 1e-3]
    done = run("prune.py", trained / "last.pt", *options, "--schedule", "cosine", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    events = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    rates = [event["lr"] for event in events if event["event"] == "step"]
    assert rates[0] == 1e-3 and rates == sorted(rates, reverse=True)


def test_mistakes_give_one_line(trained, pruned, tmp_path, monkeypatch, capsys):
    half = pruned / "0.5.pt"
    for arguments, message in [
        ([trained / "last.pt", "--keep", 1.2], "--keep 1.2: expected more than 0, which stays"),
        ([trained / "last.pt", "--keep", 0], "--keep 0: expected more than 0"),
        ([trained / "last.pt", "--params", "900M"], "less than the model's 3.8"),
        (
            [trained / "last.pt", "--params", "100k"],
            "--params 100k: expected more than 1.20M, which stays in any case",
        ),
        (
            [trained / "last.pt", "--keep", 0.1, "--structured"],
            "--keep 0.1: expected more than 0.125, which stays in any case",
        ),
        ([trained / "last.pt", "--params", "2MM"], "--params 2MM: expected a number, e.g. 76M"),
        ([half, "--keep", 0.6], "and less than the model's 0.5"),
        (
            [half, "--keep", 0.4, "--rounds", 0],
            "--rounds: expected a whole number of at least 1, not 0",
        ),
        ([trained / "last.pt", "--keep", 0.4, "--out", pruned], "holds a run already"),
        (
            [trained / "last.pt", "--keep", 0.4, "--out", pruned, "--resume"],
            "was begun with keep ['0.5', '0.8'], not ['0.4']",
        ),
        ([tmp_path / "absent.pt", "--keep", 0.4], "absent.pt: no such file"),
        (
            [trained / "last.pt", "--keep", 0.4, "--out", trained, "--resume"],
            "last.pt: was not written by prune.py",
        ),
    ]:
        out = [] if "--out" in arguments else ["--out", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", ["prune.py", *map(str, [*arguments, *out])])
        with pytest.raises(SystemExit) as stopped:
            prune.main()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert stopped.value.code == 2 and len(lines) == 1 and message in lines[0], (
            arguments,
            lines,
        )
    assert not (tmp_path / "out").exists()


def test_several_backbones_have_no_common_groups():
    model = build_model(
        GraFTConfig(image_size=(32, 64), fusion="multistream", **BACKBONES["small"])
    )
    with pytest.raises(UserError, match="3 backbones"):
        prune.shrink(model, prune.prunable(model) // 2)
