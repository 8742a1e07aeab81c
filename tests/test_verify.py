"""Rates of pairs are those of a loop over all of them; a chosen threshold keeps its rate."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_export import save_model
from test_search import call

import data
import evaluate
import runtime
from extras import search, verify
from runtime import UserError


def ranking(similarity, query, gallery) -> evaluate.Ranking:
    """Of a matrix (Q, G), and the pids and keys of both."""
    splits = [SimpleNamespace(pids=pids, keys=keys) for pids, keys in (query, gallery)]
    return evaluate.Ranking(*splits, None, lambda start, end: similarity[start:end].clone())


@pytest.fixture
def drawn() -> evaluate.Ranking:
    """23 queries of 5 identities, not in order, and 31 gallery samples, one of them of a sixth."""
    generator = torch.Generator().manual_seed(0)

    def labels(size, high):
        return torch.randint(high, (size,), generator=generator)

    query, gallery = (labels(23, 5), labels(23, 3)), (labels(31, 5), labels(31, 3))
    gallery[0][7] = 9
    features = F.normalize(torch.randn(6, 8, generator=generator))
    noise = torch.randn(54, 8, generator=generator)
    x = F.normalize(features[torch.cat([query[0], gallery[0]]).clamp(max=5)] + 0.4 * noise)
    return ranking(x[:23] @ x[23:].T, query, gallery)


def pairs_of(ranking, weight) -> tuple[list, list]:
    """Genuine and impostor (similarity, how often it is drawn), by a loop over all pairs."""
    genuine, impostor = [], []
    query, gallery = ranking.query, ranking.gallery
    similarity = ranking.similarities(0, len(query.pids))
    for q, (pid, key) in enumerate(zip(query.pids.tolist(), query.keys.tolist(), strict=True)):
        labels = zip(gallery.pids.tolist(), gallery.keys.tolist(), strict=True)
        for g, (other, other_key) in enumerate(labels):
            score = similarity[q, g].item()
            if pid != other:
                impostor.append((score, weight[pid] * weight[other]))
            elif key != other_key:
                genuine.append((score, weight[pid]))
    return genuine, impostor


def share(pairs, threshold) -> float:
    total = sum(times for _, times in pairs)
    return sum(times for score, times in pairs if score >= threshold) / total


@pytest.mark.parametrize("block", [evaluate.BLOCK, 200])
def test_rates_are_those_of_a_loop_over_all_pairs(drawn, block, monkeypatch):
    monkeypatch.setattr(evaluate, "BLOCK", block)
    pids = [0, 1, 2, 3, 4, 9]
    rates = verify.measure(drawn, (0.05,), (0.25,), resamples=8, seed=3)
    genuine, impostor = pairs_of(drawn, dict.fromkeys(pids, 1))
    assert int(rates.genuine.sum()) == len(genuine) and rates.identities == 6
    assert int(rates.impostor.sum()) == len(impostor)
    for threshold in (-0.5, 0.0, 0.25, 0.7):
        place = verify.bin_of(threshold)
        assert rates.fmr[place].item() == pytest.approx(share(impostor, threshold))
        assert rates.tpr[place].item() == pytest.approx(share(genuine, threshold))
    # The least threshold that keeps to a rate: one more impostor pair would exceed it
    threshold = rates.threshold(0.05)
    assert share(impostor, threshold) <= 0.05 < share(impostor, threshold - 2 / verify.BINS)
    monkeypatch.setattr(verify, "ENOUGH", 1)
    assert rates.tpr_at(0.05)[0] == pytest.approx(share(genuine, threshold))
    assert rates.tpr_at(1e-4) is None
    draws = runtime.numpy_rng(3, 6).multinomial(6, np.full(6, 1 / 6), 8)
    for row, draw in enumerate(draws):
        right, wrong = pairs_of(drawn, dict(zip(pids, draw, strict=True)))
        for threshold in (0.25, rates.threshold(0.05)):
            column = torch.searchsorted(rates.edges, verify.bin_of(threshold))
            found = rates.fmr_drawn[row, column].item(), rates.tpr_drawn[row, column].item()
            assert found == pytest.approx((share(wrong, threshold), share(right, threshold)))
    fmr, tpr = rates.at(0.25)
    assert fmr[1] <= fmr[0] <= fmr[2] and tpr[1] <= tpr[0] <= tpr[2]


def test_by_hand():
    """Genuine 0.9, 0.7, 0.5 and 0.3; impostors 0.6, 0.4, 0.2 and 0.0; same camera: 1.0."""
    similarity = torch.tensor([[0.9, 0.7, 0.6, 0.4, 1.0], [0.0, 0.2, 0.5, 0.3, -1.0]])
    keys = torch.tensor([1, 2, 1, 2, 0])
    pids = torch.tensor([0, 0, 1, 1, 0])
    both = ranking(similarity, (torch.tensor([0, 1]), torch.tensor([0, 0])), (pids, keys))
    rates = verify.measure(both, resamples=50)
    # The fifth impostor, -1: at 0.5 one of five is a match, and one of four genuine pairs is not
    assert rates.fmr[verify.bin_of(0.5) - 1].item() == pytest.approx(1 / 5)
    assert rates.tpr[verify.bin_of(0.5) - 1].item() == pytest.approx(3 / 4)
    assert rates.equal_error()[0] == pytest.approx((1 / 5 + 1 / 4) / 2)
    assert rates.threshold(0.2) == pytest.approx(0.4, abs=1e-5)
    # Both identities, drawn once each, or one of them twice: without a pair, and left out
    assert rates.equal_error()[1:] == pytest.approx((0.225, 0.225), abs=1e-6)
    alike = ranking(torch.ones(2, 5), (torch.tensor([0, 1]), torch.tensor([0, 0])), (pids, keys))
    assert verify.measure(alike, resamples=2).equal_error()[0] == 0.5
    with pytest.raises(UserError, match="have a similarity of 1"):
        verify.measure(alike, resamples=2).threshold(0.1)
    one = (torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1]))
    with pytest.raises(UserError, match="all samples are of one identity"):
        verify.measure(ranking(torch.ones(2, 2), one, one))


def test_a_threshold_keeps_its_rate_on_others():
    """Impostors are random directions, whose cosine's law is known: (1 - s^2)^((D - 3) / 2)."""
    D, wanted = 16, 0.02
    s = torch.linspace(-1, 1, 100001, dtype=torch.float64)
    density = (1 - s * s) ** ((D - 3) / 2)
    true = density.flip(0).cumsum(0).flip(0) / density.sum()
    pids = torch.arange(30).repeat_interleave(6)
    keys = torch.arange(6).repeat(30)
    labels = (pids, keys)
    covered, means = 0, []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(30, D, generator=generator)[pids]
        x = F.normalize(x + 0.5 * torch.randn(180, D, generator=generator))
        rates = verify.measure(ranking(x @ x.T, labels, labels), (wanted,), resamples=100)
        threshold = rates.threshold(wanted)
        measured, low, high = rates.at(threshold)[0]
        rate = true[torch.searchsorted(s, torch.tensor(threshold, dtype=torch.float64))].item()
        covered += low <= rate <= high
        means.append(rate)
        assert measured <= wanted
    assert covered >= 10  # of 12 intervals of 95%
    assert np.mean(means) == pytest.approx(wanted, rel=0.15)


def test_a_rate_is_exceeded_where_neither_set_of_identities_explains_it():
    chosen = {"wanted_fmr": 0.01, "measured_fmr": 0.01, "interval": (0.006, 0.014)}
    assert not verify.exceeds((0.012, 0.011, 0.013), chosen)  # the threshold is uncertain, too
    assert not verify.exceeds((0.0149, 0.0119, 0.02), chosen)  # 3 and 4 make 5 of a thousand
    assert verify.exceeds((0.0151, 0.0121, 0.02), chosen)
    assert not verify.exceeds((0.001, 0.0, 0.002), chosen)


# --- the programs


@pytest.fixture
def checkpoint(tiny_data, tmp_path):
    """Of an untrained model, with the settings of a run on the tiny set."""
    (tmp_path / "run").mkdir()
    path, names = tmp_path / "run" / "last.pt", ("rgb", "nir", "tir")
    settings = {"dataset": "synthetic", "data_root": str(tiny_data), "val_ids": 0, "workers": 0}
    save_model(path, modalities=names)
    return rewrite(path, modalities=names, precision="fp32", **settings)


def rewrite(path, pids=(), **settings):
    content = runtime.load_checkpoint(path)
    content["settings"] |= settings
    runtime.save_checkpoint(path, content | {"pids": list(pids)})
    return path


def test_from_pairs_to_a_match(checkpoint, tiny_data, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny_data, other)
    flags = ["--fmr", 0.1, "--calibrate-on", other, "--out", tmp_path / "out"]
    assert call(verify, monkeypatch, checkpoint, *flags) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "336 genuine and 768 impostor pairs of 3 identities" in out
    assert "TPR at FMR 0.01   too few pairs: it takes 3000 impostors" in out
    assert Image.open(tmp_path / "out" / "verify.png").width > 600
    figures = json.loads((tmp_path / "out" / "verify.json").read_text())
    chosen = json.loads((checkpoint.parent / "threshold.json").read_text())
    # The very images, so the rate measured here is the one measured there
    assert figures["threshold"]["FMR"] == [chosen["measured_fmr"], *chosen["interval"]]
    assert chosen["measured_fmr"] <= 0.1 and chosen["wanted_fmr"] == 0.1
    # Held-out training identities: of 4, the last two
    train = data.load_dataset("synthetic", tiny_data).train
    rewrite(checkpoint, train.pids.unique().tolist()[:2], val_ids=2)
    assert call(verify, monkeypatch, checkpoint, "--fmr", 0.2) == 0, capsys.readouterr().err
    assert "on 2 identities (what --val-ids held out)" in capsys.readouterr().out
    gallery = tmp_path / "gallery.npz"
    folder = tmp_path / "photos" / "rgb"
    folder.mkdir(parents=True)
    for i, level in enumerate((20, 90, 200)):
        noise = np.random.default_rng(i).integers(level, size=(32, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    argv = (checkpoint, "index", tmp_path / "photos", "--out", gallery)
    assert call(search, monkeypatch, *argv, "--precision", "fp32") == 0
    argv = ("--precision", "fp32", "--picture", tmp_path / "found.png")
    argv = (checkpoint, "query", gallery, f"rgb={folder}/1.png", *argv, "--threshold")
    capsys.readouterr()
    assert call(search, monkeypatch, *argv, 0.9999) == 0
    out = capsys.readouterr().out
    assert "1       1.000  match  1\n" in out and "1 of 3 samples match" in out
    unlike = [f"tir={folder}/1.png" if word == argv[3] else word for word in argv]
    assert call(search, monkeypatch, *unlike, 0.9999) == 0
    assert "none of 3 samples match" in capsys.readouterr().out
    assert call(search, monkeypatch, *argv) == 0
    out, threshold = capsys.readouterr().out, verify_threshold(checkpoint)
    assert f"similarity of {threshold:.4f} or more" in out
    assert "the threshold is for samples of rgb, nir, tir: for others its rate is not" in out


def verify_threshold(checkpoint) -> float:
    return json.loads((checkpoint.parent / "threshold.json").read_text())["threshold"]


def test_mistakes_give_one_line(checkpoint, tiny_data, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    for words, message in [
        (["--fmr", 0.1], "trained without --val-ids, and a threshold chosen on identities"),
        (["--fmr", 0], "expected a number from 1e-06 to 0.5, not 0"),
        (["--calibrate-on", tiny_data], "say for which false-match rate, e.g. --fmr 1e-2"),
        (["--fmr", 0.1, "--calibrate-on", tmp_path / "none"], "none: no such folder"),
        (["--fmr", 0.1, "--calibrate-on", tiny_data], "holds the very images"),
        (["--modalities", "uv"], "--modalities uv: the model was trained on rgb,nir,tir"),
    ]:
        assert call(verify, monkeypatch, checkpoint, *words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.pt"]
    train = data.load_dataset("synthetic", tiny_data).train.pids.unique().tolist()
    rewrite(checkpoint, train[2:], val_ids=2)
    assert call(verify, monkeypatch, checkpoint, "--fmr", 0.1) == 2
    assert "its training identities are not those that" in capsys.readouterr().err
    rewrite(checkpoint, train[:2], val_ids=2)
    assert call(verify, monkeypatch, checkpoint, "--fmr", 0.01) == 2
    assert "256 impostor pairs, expected at least 3000" in capsys.readouterr().err
    file = checkpoint.parent / "threshold.json"
    for content, message in [
        (None, "threshold.json: no such file; make it by python -m extras.verify"),
        ("{", "not a threshold of extras.verify"),
        ('{"threshold": "high", "modalities": []}', "not a threshold of extras.verify"),
        ('{"threshold": 0.5, "modalities": [], "checkpoint": "0"}', "chosen for another model"),
    ]:
        if content:
            file.write_text(content)
        with pytest.raises(UserError, match=message):
            search.read_threshold(str(checkpoint))
