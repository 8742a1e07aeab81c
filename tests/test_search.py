"""Pictures say what the ranking says; a folder of photos is searched as the metric ranks."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run
from PIL import Image

import data
import evaluate
from extras import pictures, search
from runtime import UserError


def call(program, monkeypatch, *argv) -> int:
    """Exit code of a program called here."""
    monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, argv)])
    with pytest.raises(SystemExit) as end:
        program.main()
    return end.value.code


# --- pictures


def colours(path) -> dict:
    """How often each colour is in a picture."""
    image = Image.open(path).convert("RGB")
    return {colour: count for count, colour in image.getcolors(image.width * image.height)}


def cell(value, colour, **sizes):
    return pictures.Cell(
        {m: torch.full((3, *size), value, dtype=torch.uint8) for m, size in sizes.items()},
        ("a", "b"),
        colour,
    )


def test_a_sheet_shows_each_image_in_its_own_aspect_and_frame(tmp_path):
    rows = [
        [
            cell(11, pictures.RIGHT, rgb=(20, 40)),
            cell(12, pictures.WRONG, rgb=(20, 40), tir=(40, 20)),
        ],
        [cell(13, pictures.PLAIN)],
    ]
    pictures.sheet(rows, ("rgb", "tir"), tmp_path / "sheet.png")
    found, H = colours(tmp_path / "sheet.png"), pictures.HEIGHT
    assert abs(found[11, 11, 11] - 2 * H * H) < 50  # letters have a few grey pixels, too
    assert abs(found[12, 12, 12] - 2 * H * H - H * H // 2) < 50
    frame = (2 * H + 8) * (2 * H + 8) - (2 * H) * (
        2 * H
    )  # two rows of images twice as wide as high
    assert found[pictures.RIGHT] == found[pictures.WRONG] == found[pictures.PLAIN] == frame
    with pytest.raises(UserError, match=r"none/sheet.png: cannot be written"):
        pictures.sheet(rows, ("rgb", "tir"), tmp_path / "none" / "sheet.png")


def test_heat_is_where_the_weight_is():
    weights = torch.zeros(4, 8)
    weights[1, 6] = 0.5
    hot = pictures.heat(torch.full((3, 64, 128), 100, dtype=torch.uint8), weights)
    assert hot.shape == (3, 64, 128) and hot[:, 24, 104].min() > 150  # the patch's middle: white
    assert (hot[:, 50, 20] == 45).all()  # the rest: darker grey


@pytest.fixture(scope="module")
def ranking(tiny_data):
    """Query and gallery of the tiny set, ranked by features that are far from ties."""
    dataset = data.load_dataset("synthetic", tiny_data, image_size=(32, 64))
    query, gallery = dataset.query, dataset.gallery
    generator = torch.Generator().manual_seed(0)
    q, g = (F.normalize(torch.randn(len(s), 16, generator=generator)) for s in (query, gallery))
    metrics = evaluate.rank_metrics(q, g, query.pids, gallery.pids, query.keys, gallery.keys)
    return evaluate.Ranking(query, gallery, metrics, lambda start, end: q[start:end] @ g.T)


def load(trained) -> evaluate.Embedder:
    options = {"precision": "fp32", "workers": 0}
    return evaluate.load_embedder(trained / "last.pt", torch.device("cpu"), **options)[0]


def test_lists_are_ranked_as_the_metric_ranks(ranking, monkeypatch):
    query, gallery, metrics, _ = ranking
    sheets = []
    monkeypatch.setattr(pictures, "sheet", lambda rows, modalities, path: sheets.append(rows))
    chosen = [(i, "named") for i in range(len(query))]
    pictures.ranked_list(ranking, chosen, "", top=len(gallery))
    pictures.failures(ranking, chosen, "")
    for i, ((asked, *answers), (_, *wrong, first)) in enumerate(zip(*sheets, strict=True)):
        right = np.array([cell.colour == pictures.RIGHT for cell in answers])
        precision = right.cumsum()[right] / (np.flatnonzero(right) + 1)
        assert precision.mean() == pytest.approx(metrics.ap[i].item())
        assert (
            len(answers) == len(gallery) - 2
            and asked.lines[1] == f"named, AP {100 * metrics.ap[i]:.0f}%"
        )  # same camera: 2
        assert first.colour == pictures.RIGHT and first.lines[0].startswith(
            f"rank {right.argmax() + 1}: {query.pids[i]:04}_c"
        )
        assert all(cell.colour == pictures.WRONG for cell in wrong) and len(wrong) == 6
        distances = [float(cell.lines[1].split()[1]) for cell in answers]
        assert distances == sorted(distances)


def test_chosen_queries(ranking):
    query, _, metrics, _ = ranking
    name = query.samples[7].name
    chosen = pictures.choose(["best", name, "worst", "random"], query, metrics.ap, 3)
    assert [reason for _, reason in chosen] == [
        "best",
        "best",
        "named",
        "worst",
        "worst",
        "random",
        "random",
    ]
    assert (
        metrics.ap[chosen[0][0]] == metrics.ap.max()
        and metrics.ap[chosen[3][0]] == metrics.ap.min()
        and chosen[2][0] == 7
    )
    assert (
        pictures.choose(["random"], query, metrics.ap, 3)
        == chosen[5:]
        != pictures.choose(["random"], query, metrics.ap, 4)
    )
    with pytest.raises(UserError, match="--queries 9999: no query has this name"):
        pictures.choose(["9999"], query, metrics.ap, 0)


def test_evaluate_draws_what_it_is_asked_for(trained, tmp_path, monkeypatch, capsys):
    files = [tmp_path / f"{name}.png" for name in ("list", "failures", "attention", "cmc")]
    flags = [
        "--ranked-list",
        files[0],
        "--failures",
        files[1],
        "--attention",
        files[2],
        "--cmc",
        files[3],
    ]
    more = ["--rerank", "--flip", "--json", tmp_path / "metrics.json"]
    assert call(evaluate, monkeypatch, trained / "last.pt", *flags, *more) == 0
    assert all(Image.open(file).width > 300 for file in files)
    assert "darker half of the queries" in capsys.readouterr().out
    plain = json.loads((trained / "metrics.json").read_text())
    assert json.loads((tmp_path / "metrics.json").read_text())["mAP"] != plain["mAP"]
    assert call(evaluate, monkeypatch, trained / "last.pt", "--all-subsets", *flags) == 2
    assert "are of one pair of subsets" in capsys.readouterr().err


def test_curves_beside_the_log(trained, tmp_path, monkeypatch, capsys):
    shutil.copy(trained / "log.jsonl", tmp_path)
    assert call(pictures, monkeypatch, tmp_path) == 0
    assert Image.open(tmp_path / "curves.png").width > 300
    (tmp_path / "log.jsonl").write_text("no log")
    assert call(pictures, monkeypatch, tmp_path) == 2 and "not a log" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    shutil.copy(trained / "log.jsonl", tmp_path)
    assert (
        call(pictures, monkeypatch, tmp_path) == 2
        and "charts need matplotlib" in capsys.readouterr().err
    )


# --- search


@pytest.fixture
def photos(tiny_data, tmp_path):
    """The gallery as a folder of two-modality photos, some of them without TIR."""
    gallery = data.load_dataset("synthetic", tiny_data, ("rgb", "tir"), (32, 64)).gallery
    for i, sample in enumerate(gallery.samples):
        for modality, image in gallery[i][0].items():
            if modality == "rgb" or i % 4:
                path = tmp_path / "photos" / modality / f"id {sample.pid}" / f"{i:03}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return tmp_path / "photos", gallery


def test_from_photos_to_a_result(trained, photos, tmp_path):
    folder, gallery = photos
    npz, ckpt = tmp_path / "gallery.npz", trained / "last.pt"
    done = run("-m", "extras.search", ckpt, "index", folder, "--out", npz, "--precision", "fp32")
    assert (
        done.returncode == 0 and "48 samples (48 with rgb, 0 with nir, 36 with tir)" in done.stdout
    ), done.stderr
    arrays = np.load(npz)
    assert arrays["features"].dtype == np.float32 and arrays["features"].shape == (48, 192)
    np.testing.assert_allclose(np.linalg.norm(arrays["features"], axis=1), 1, atol=1e-5)
    whole = load(trained).embed(gallery).numpy()
    of_file = {int(name[-3:]): i for i, name in enumerate(arrays["names"])}
    for i in (1, 2, 3, 47):
        np.testing.assert_allclose(arrays["features"][of_file[i]], whole[i], atol=1e-5)
    name = arrays["names"][of_file[5]]
    words = [f"tir={folder}/tir/{name}.png", f"rgb={folder}/rgb/{name}.png"]
    done = run(
        "-m",
        "extras.search",
        ckpt,
        "query",
        npz,
        *words,
        "--top",
        3,
        "--picture",
        tmp_path / "found.png",
        "--precision",
        "fp32",
    )
    assert done.returncode == 0, done.stderr
    table = [
        line.split(maxsplit=2) for line in done.stdout.splitlines() if line.strip()[:1].isdigit()
    ]
    assert table[0] == ["1", "1.000", str(name)] and len(table) == 3
    expected = np.sort(arrays["features"] @ whole[5])[::-1][:3]
    assert [float(line[1]) for line in table] == pytest.approx(expected, abs=1e-3)
    assert Image.open(tmp_path / "found.png").width > 500


def test_mistakes_in_a_search_give_one_line(trained, photos, tmp_path, monkeypatch, capsys):
    folder, _ = photos
    ckpt, npz = trained / "last.pt", tmp_path / "gallery.npz"
    (tmp_path / "empty").mkdir()
    own = search.fingerprint(ckpt)
    np.savez(
        npz,
        features=np.zeros((2, 3)),
        names=np.array(["a"]),
        files=np.zeros((2, 1)),
        modalities=["rgb"],
        model=own,
    )
    np.savez(
        tmp_path / "other.npz",
        features=np.zeros((1, 3)),
        names=["a"],
        files=[["a"]],
        modalities=["rgb"],
        model="0",
    )
    np.savez(tmp_path / "pickle.npz", features=np.array([{}], dtype=object))
    image = next((folder / "rgb").rglob("*.png"))
    for words, message in [
        (["index", tmp_path / "empty"], "no images; expected"),
        (["index", folder, "--out", tmp_path / "gallery.txt"], "expected a name as gallery.npz"),
        (
            ["query", tmp_path / "absent.npz", f"rgb={image}"],
            "absent.npz: no such file; make it by",
        ),
        (["query", npz, f"rgb={image}"], "its arrays do not fit"),
        (["query", tmp_path / "pickle.npz", f"rgb={image}"], "not a gallery"),
        (["query", ckpt, f"rgb={image}"], "not a gallery"),
        (["query", tmp_path / "other.npz", f"rgb={image}"], "was embedded by another model"),
        (
            ["query", npz, f"rgb={image}", "--top", 0],
            "--top: expected a whole number of at least 1, not 0",
        ),
    ]:
        assert call(search, monkeypatch, ckpt, *words) == 2
        assert message in capsys.readouterr().err
    assert call(search, monkeypatch, ckpt, "index", folder, "--out", npz) == 0
    for words, message in [
        ([f"uv={image}"], "expected some of rgb=FILE nir=FILE tir=FILE"),
        ([f"rgb={tmp_path}/none.png"], "none.png: not an image"),
        ([str(image)], "expected some of rgb=FILE"),
    ]:
        assert call(search, monkeypatch, ckpt, "query", npz, *words) == 2
        assert message in capsys.readouterr().err
