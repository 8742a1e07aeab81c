"""Rates of pairs are those of a loop over all of them; a chosen threshold keeps its rate."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fails, read_json, succeeds
from PIL import Image, ImageOps
from test_export import save_model

import data
import evaluate
import runtime
from extras import search, verify
from runtime import UserError


def ranking(similarity, query, gallery) -> evaluate.Ranking:
    """Of a matrix (Q, G), and the pids and keys of both."""
    splits = [SimpleNamespace(pids=pids, keys=keys) for pids, keys in (query, gallery)]
    return evaluate.Ranking(*splits, None, lambda start, end: similarity[start:end])


def pairs_of(ranking, without=None) -> tuple[list, list]:
    """The similarities of genuine and impostor pairs, by a loop over all of them."""
    genuine, impostor = [], []
    query, gallery = ranking.query, ranking.gallery
    similarity = ranking.similarities(0, len(query.pids))
    for q, (pid, key) in enumerate(zip(query.pids, query.keys, strict=True)):
        for g, (other, other_key) in enumerate(zip(gallery.pids, gallery.keys, strict=True)):
            if pid != other and without not in (pid, other):
                impostor.append(similarity[q, g].item())
            elif pid == other != without and key != other_key:
                genuine.append(similarity[q, g].item())
    return genuine, impostor


def share(similarities, threshold) -> float:
    return float(np.mean(np.array(similarities) >= threshold))


def test_rates_are_those_of_a_loop_over_all_pairs():
    """23 queries of 5 identities, not in order, and 31 gallery samples, one of them of a sixth."""
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randint(5, (2, n), generator=generator) for n in (23, 31))
    gallery[0, 7] = 9
    features = F.normalize(torch.randn(6, 8, generator=generator))
    noise = torch.randn(54, 8, generator=generator)
    x = F.normalize(features[torch.cat([query[0], gallery[0]]).clamp(max=5)] + 0.4 * noise)
    pairs = ranking(x[:23] @ x[23:].T, query, gallery)
    rates = verify.measure(pairs, (0.05,), (0.25,))
    genuine, impostor = pairs_of(pairs)
    assert rates.pairs == {"genuine": len(genuine), "impostor": len(impostor)}
    threshold = float(rates.thresholds[rates.index_of(0.05)])
    # The least threshold that keeps to a rate: one more impostor pair would exceed it
    assert share(impostor, threshold) <= 0.05 < share(impostor, np.float32(threshold - 1e-7))
    assert rates.tpr_at(0.05)[0] == pytest.approx(share(genuine, threshold))
    for chosen in (0.25, threshold):
        measured = [rate[0] for rate in rates.at(chosen)]
        assert measured == pytest.approx([share(impostor, chosen), share(genuine, chosen)])
        column = np.searchsorted(rates.thresholds, chosen)
        for i, pid in enumerate([0, 1, 2, 3, 4, 9]):
            right, wrong = pairs_of(pairs, without=pid)
            assert rates.fmr_without[i, column] == pytest.approx(share(wrong, chosen))
            assert rates.tpr_without[i, column] == pytest.approx(share(right, chosen))
    for rate, low, high in (*rates.at(0.25), rates.equal_error(), rates.tpr_at(0.05)):
        assert low < rate < high


def test_by_hand():
    """Genuine 0.9, 0.7, 0.5 and 0.3; impostors 0.6, 0.4, 0.2, 0.0 and -1; same camera: 1.0."""
    similarity = torch.tensor([[0.9, 0.7, 0.6, 0.4, 1.0], [0.0, 0.2, 0.5, 0.3, -1.0]])
    keys, pids = torch.tensor([1, 2, 1, 2, 0]), torch.tensor([0, 0, 1, 1, 0])
    queries = torch.tensor([0, 1]), torch.tensor([0, 0])
    rates = verify.measure(ranking(similarity, queries, (pids, keys)), (0.2,), (0.5,))
    assert [rate[0] for rate in rates.at(0.5)] == pytest.approx([1 / 5, 3 / 4])
    assert rates.thresholds[rates.index_of(0.2)] == pytest.approx(0.4, abs=1e-6)
    # Of five impostors one or two match, and one of four genuine pairs does not
    assert rates.equal_error()[0] == pytest.approx(1 / 4)
    one = (torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1]))
    with pytest.raises(UserError, match="all samples show one identity"):
        verify.measure(ranking(torch.ones(2, 2), one, one))


def test_intervals_cover_the_true_rate(ids=50, simulations=1000):
    """50 identities of 8 types, some of them frequent: most false matches are within a type."""
    generator = torch.Generator().manual_seed(0)
    types, shares = torch.randn(8, 32, generator=generator), 1 / torch.arange(1.0, 9)

    def photos(people, count):
        x = types[shares.multinomial(people, True, generator=generator)]
        x = x + 0.8 * torch.randn(people, 32, generator=generator)
        x = x[:, None] + 0.6 * torch.randn(people, count, 32, generator=generator)
        return F.normalize(x, dim=-1)

    many = photos(3000, 1)[:, 0]
    true = np.sort((many @ many.T)[~torch.eye(3000, dtype=torch.bool)].numpy())
    others = ~torch.eye(ids, dtype=torch.bool)
    covered = []
    for _ in range(simulations):
        x = photos(ids, 6)
        pairs = torch.einsum("iad,jbd->ijab", x[:, :2], x[:, 2:])[others]  # (pairs of people, 2, 4)
        threshold = np.sort(pairs.numpy().ravel())[-pairs.numel() // 100]
        matches = torch.zeros(ids, ids)
        matches[others] = (pairs >= threshold.item()).sum((1, 2)).float()
        total = matches.sum()
        left = (total - matches.sum(0) - matches.sum(1)) / (8 * (ids - 1) * (ids - 2))
        _, low, high = verify.interval(total / pairs.numel(), left.numpy())
        covered.append(low <= 1 - np.searchsorted(true, threshold) / len(true) <= high)
    assert 0.93 <= np.mean(covered) <= 0.97


def test_what_no_identity_shows_may_still_be():
    assert verify.interval(0, np.zeros(50)) == (0, 0, 0.06)
    assert verify.interval(1, np.ones(50)) == (1, 0.94, 1)


# --- the programs


@pytest.fixture
def checkpoint(tiny_data, tmp_path):
    """Of an untrained model, with the settings of a run on the tiny set."""
    (tmp_path / "run").mkdir()
    settings = {"dataset": "synthetic", "data_root": str(tiny_data), "val_ids": 0, "workers": 0}
    settings |= {"modalities": ("rgb", "nir", "tir"), "precision": "fp32"}
    return save_model(tmp_path / "run" / "last.pt", settings)


def copied(root, out, change):
    """The test split of a rendered set, `change`d, in files of other names."""
    for split in ("query", "bounding_box_test"):
        (out / "rgbir" / split).mkdir(parents=True)
        for path in (root / "rgbir" / split).iterdir():
            change(Image.open(path)).save(out / "rgbir" / split / f"9{path.stem}.png")
    shutil.copy(root / "VERSION", out)
    return out


def test_from_pairs_to_a_match(checkpoint, tiny_data, tmp_path):
    other = copied(tiny_data, tmp_path / "other", ImageOps.flip)
    flags = ("--fmr", 0.1, "--calibrate-on", other, "--out", tmp_path / "out")
    out = succeeds(verify, checkpoint, *flags)
    assert "336 genuine and 768 impostor pairs of 3 identities" in out
    assert "TPR at FMR 0.01   too few pairs: 3000 impostor pairs are needed" in out
    assert Image.open(tmp_path / "out" / "verify.png").width > 600
    chosen = read_json(checkpoint.parent / "threshold.json")
    tested = read_json(tmp_path / "out" / "verify.json")["threshold"]
    assert tested["threshold"] == chosen["threshold"]
    assert chosen["measured_fmr"] <= 0.1
    assert chosen["interval"][0] < chosen["measured_fmr"] < chosen["interval"][1]
    assert search.read_threshold(checkpoint) == (chosen["threshold"], ["rgb", "nir", "tir"])


def test_the_threshold_of_held_out_identities(checkpoint, tiny_data):
    """Of the 4 training identities the last two are held out."""
    pids = data.load_dataset("synthetic", tiny_data).train.pids.unique().tolist()
    content = runtime.load_checkpoint(checkpoint)
    content["settings"]["val_ids"] = 2
    runtime.save_checkpoint(checkpoint, {**content, "pids": pids[:2]})
    out = succeeds(verify, checkpoint, "--fmr", 0.2)
    assert "chosen on 2 identities (what --val-ids held out)" in out
    assert "256 impostor pairs, but this rate needs 3000" in fails(
        verify, checkpoint, "--fmr", 0.01
    )
    runtime.save_checkpoint(checkpoint, {**content, "pids": pids[2:]})
    assert "was trained on other identities" in fails(verify, checkpoint, "--fmr", 0.1)


def test_mistakes_give_one_line(checkpoint, tiny_data, tmp_path):
    renamed = copied(tiny_data, tmp_path / "renamed", lambda image: image)
    for words, message in (
        (("--fmr", 0.1), "was trained without --val-ids, and a threshold"),
        (("--fmr", 0), "expected a number from 1e-06 to 0.5, not 0"),
        (("--calibrate-on", tiny_data), "needs a false-match rate, e.g. --fmr 1e-2"),
        (("--fmr", 0.1, "--calibrate-on", tmp_path / "none"), "none"),
        (("--fmr", 0.1, "--calibrate-on", tiny_data), "has 3 identities"),
        (("--fmr", 0.1, "--calibrate-on", renamed), "whose images are in the data set"),
        (("--modalities", "uv"), "the model has no modality uv"),
    ):
        assert message in fails(verify, checkpoint, *words)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.pt"]
    for content, message in (
        ("", "Expecting value"),
        ("[]", "holds no threshold of this model"),
        ('{"threshold": 0.5, "modalities": [], "checkpoint": "0"}', "chosen for another model"),
    ):
        search.threshold_file(checkpoint).write_text(content)
        with pytest.raises(UserError, match=message):
            search.read_threshold(checkpoint)
