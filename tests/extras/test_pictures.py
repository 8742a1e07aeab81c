"""Pictures say what the ranking says; curves show a run's log."""

import importlib.util
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fails, succeeds
from PIL import Image

import data
import evaluate
from extras import pictures
from model import GraFTConfig, build_model


def colours(path) -> dict:
    """How often each colour is in a picture."""
    image = Image.open(path).convert("RGB")
    return {colour: count for count, colour in image.getcolors(image.width * image.height)}


def cell(value, colour, **sizes):
    images = {m: torch.full((3, *size), value, dtype=torch.uint8) for m, size in sizes.items()}
    return pictures.Cell(images, ("a", "b"), colour)


def test_a_sheet_shows_each_image_in_its_own_aspect_and_frame(tmp_path):
    wide, both = {"rgb": (20, 40)}, {"rgb": (20, 40), "tir": (40, 20)}
    first = [cell(11, pictures.RIGHT, **wide), cell(12, pictures.WRONG, **both)]
    rows = [first, [cell(13, pictures.MATCH), cell(14, pictures.PLAIN)]]
    pictures.sheet(rows, ("rgb", "tir"), tmp_path / "sheet.png", ("A line of text.",))
    found, H = colours(tmp_path / "sheet.png"), pictures.HEIGHT
    assert abs(found[11, 11, 11] - 2 * H * H) < 50  # letters have a few grey pixels, too
    assert abs(found[12, 12, 12] - 2 * H * H - H * H // 2) < 50
    assert abs(found[pictures.ABSENT] - 5 * 2 * H * H) < 200  # of eight images three are there
    frame = (2 * H + 8) * (2 * H + 8) - (2 * H) * (2 * H)  # two rows of images, 2 to 1
    for colour in (pictures.RIGHT, pictures.WRONG, pictures.MATCH, pictures.PLAIN):
        assert found[colour] == frame


@pytest.mark.parametrize("least", [0.0, 0.3])
def test_heat_runs_from_the_maps_own_least_to_its_most(least):
    weights = torch.full((4, 8), least)
    weights[1, 6] = least + 0.1
    hot = pictures.heat(torch.full((3, 64, 128), 100, dtype=torch.uint8), weights)
    assert hot.shape == (3, 64, 128 + 3 + 6)  # the map, a gap, the bar
    assert hot[:, 24, 104].min() > 150  # the patch's middle: white
    assert (hot[:, 50, 20] == 45).all()  # the rest: darker grey
    assert (hot[:, 0, -1] == 255).all()
    assert (hot[:, -1, -1] == 0).all()


def test_heat_lies_where_patches_that_overlap_do():
    weights = torch.zeros(7, 15)  # of 16 pixels, 8 apart
    weights[0, 14] = 1.0
    hot = pictures.heat(torch.zeros(3, 64, 128, dtype=torch.uint8), weights, border=4)
    brightness = hot[:, :, :128].sum(0, dtype=torch.float)
    centre = brightness[7:9, 119:121]
    assert centre.mean() > 0.95 * brightness.max()
    assert brightness[7:9, 111:113].max() < 0.1 * brightness.max()  # the next patch's
    assert (hot[:, 24:, :96] == 0).all()


def test_attention_maps_by_the_formula():
    """softmax(q k^T / sqrt(D/H)) of two fusion tokens, on the patches of a 2 x 4 grid."""
    torch.manual_seed(0)
    sizes = {"encoder_heads": 2, "fusion_tokens": 2}
    model = build_model(GraFTConfig(("rgb", "tir"), 3, (16, 32), 8, 32, 1, 2, **sizes)).eval()
    images = {"rgb": torch.randn(3, 3, 16, 32), "tir": torch.randn(3, 3, 16, 32)}
    maps = pictures.attention_maps(model, images)
    for modality, data_tokens in model.extract(images).items():
        tokens = torch.cat([model.fusion_token.expand(3, -1, -1), data_tokens], 1)
        layer = model.encoders[modality].self_attn
        qkv = F.linear(tokens, layer.in_proj_weight, layer.in_proj_bias)
        q, k, _ = qkv.unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)  # 3 x (B, H, N, D/H)
        weights = (q[:, :, :2] @ k.transpose(-2, -1) / 4).softmax(-1).mean((1, 2))
        expected = weights[:, 4:].view(3, 2, 4)  # behind two fusion tokens, CLS, distillation
        torch.testing.assert_close(maps[modality], expected)


@pytest.fixture(scope="module")
def ranking(tiny_data):
    """Query and gallery of the tiny set, ranked by features that are far from ties."""
    dataset = data.load_dataset("synthetic", tiny_data, image_size=(32, 64))
    query, gallery = dataset.query, dataset.gallery
    generator = torch.Generator().manual_seed(0)
    q, g = (F.normalize(torch.randn(len(s), 16, generator=generator)) for s in (query, gallery))
    return evaluate.rank_features(lambda a, b: a @ b.T, (query, q), (gallery, g))


def test_lists_are_ranked_as_the_metric_ranks(ranking):
    query, gallery, metrics, _ = ranking
    chosen = [(i, "named") for i in range(len(query))]
    lists = pictures.ranked_list(ranking, chosen, top=len(gallery))
    failures = pictures.ranked_list(ranking, chosen, 6, failures=True)
    for i, ((asked, *answers), (_, *wrong, first)) in enumerate(zip(lists, failures, strict=True)):
        right = np.array([cell.colour == pictures.RIGHT for cell in answers])
        precision = right.cumsum()[right] / (np.flatnonzero(right) + 1)
        assert precision.mean() == pytest.approx(metrics.ap[i].item())
        assert len(answers) == len(gallery) - 2  # of the query's identity and camera: 2
        assert asked.lines[1] == f"named, AP {100 * metrics.ap[i]:.1f}%"
        assert first.colour == pictures.RIGHT
        assert first.lines[0].startswith(f"{right.argmax() + 1}. {query.pids[i]:04}_c")
        assert [cell.colour for cell in wrong] == 6 * [pictures.WRONG]
        words = [cell.lines[1].split() for cell in answers]
        assert {word for word, _ in words} == {"similarity"}
        similarities = [float(number) for _, number in words]
        assert similarities == sorted(similarities, reverse=True)


def test_chosen_queries(ranking):
    query, _, metrics, _ = ranking
    name, ap = query.samples[7].name, metrics.ap
    chosen = pictures.choose(["best", name, "worst", "random"], query, ap, 3)
    assert [reason[0] for _, reason in chosen] == list("bbnwwrr")
    assert ap[chosen[0][0]] == ap.max()
    assert ap[chosen[3][0]] == ap.min()
    assert chosen[2] == (7, "named")
    assert pictures.choose(["random"], query, ap, 4) != chosen[5:]


def test_evaluate_draws_what_it_is_asked_for(trained, tmp_path, monkeypatch):
    names = ("ranked-list", "failures", "attention", "cmc")
    files = {f"--{name}": tmp_path / f"{name}.png" for name in names}
    options = [word for pair in files.items() for word in pair]
    stdout = succeeds(evaluate, trained, *options, "--rerank")
    for file in files.values():
        assert Image.open(file).width > 300
        assert f"{file}: " in stdout
    assert "--queries nobody" in fails(evaluate, trained, *options, "--queries", "nobody")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "sklearn" and find(name))
    assert "needs scikit-learn: pip install" in fails(evaluate, trained, "--map", "map.png")


# --- curves


def test_curves_weigh_each_loss(trained, tmp_path, monkeypatch):
    assert f"{trained}/curves.png: losses" in succeeds(pictures, trained)
    losses, rate, _ = pictures.training_panels(trained)
    lines = losses["lines"]
    parts = [y for label, (_, y) in lines.items() if label != "loss"]
    np.testing.assert_allclose(np.nansum(parts, 0), lines["loss"][1], rtol=1e-5)
    assert len(parts) == 3
    assert rate["lines"]["rate"][0] == list(range(1, 33))  # 16 steps a stage
    assert rate["marks"] == {"stage 2": 16}
    shutil.copy(trained / "config.json", tmp_path)
    assert "expected the folder of a run" in fails(pictures, tmp_path / "last.pt")
    (tmp_path / "log.jsonl").write_text("no log")
    assert "expected the folder of a run" in fails(pictures, tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs matplotlib: pip install" in fails(pictures, trained)


def test_axes_are_plain():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.plot([1, 2], [0, 30])
    pictures.plain_axes(axes)
    assert axes.get_ylim()[0] == 0
    axes.set(yscale="log", ylim=(1e-3, 10))
    pictures.plain_axes(axes)
    assert [axes.yaxis.get_major_formatter()(y) for y in (0.001, 10)] == ["0.001", "10"]
