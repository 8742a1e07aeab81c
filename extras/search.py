"""Search for an object: embed a folder of images once, then ask which samples show the same object.

python -m extras.search CKPT index FOLDER --out gallery.npz             FOLDER/MODALITY/NAME.jpg
python -m extras.search CKPT query gallery.npz rgb=a.jpg tir=b.jpg      prints and draws the best

A sample may lack modalities; its files have the same name. gallery.npz holds plain arrays: features
(N, D), float32, L2-normalised, so that their product is the cosine; names (N,); files (N, M), ""
where a modality is absent; modalities (M,).
"""

import argparse
import hashlib
import json
import math
from pathlib import Path

import numpy as np

import data
import evaluate
import runtime
from extras import pictures
from runtime import UserError, real, whole

THRESHOLD_FILE = "threshold.json"  # beside a checkpoint


def find_samples(folder: Path, modalities: tuple[str, ...]) -> list[data.Sample]:
    """The samples of FOLDER/MODALITY/**, paired by their path without MODALITY and suffix."""
    files: dict[str, dict[str, tuple[Path, None]]] = {}
    for modality in modalities:
        for path in sorted((folder / modality).rglob("*")):
            if path.suffix.lower() not in data.SUFFIXES:
                continue
            name = path.relative_to(folder / modality).with_suffix("").as_posix()
            sample = files.setdefault(name, {})
            if modality in sample:
                twin = sample[modality][0].name
                raise UserError(f"{path}: the same sample as {twin}; remove one of them")
            sample[modality] = (path, None)
    if not files:
        expected = ", ".join(modalities)
        raise UserError(
            f"{folder}: no images; expected {folder}/MODALITY/NAME.jpg, MODALITY one of {expected}"
        )
    return [data.Sample(name, 0, 0, images) for name, images in sorted(files.items())]


def make_split(samples: list[data.Sample], embedder: evaluate.Embedder, args) -> data.Split:
    config = embedder.model.config
    return data.Split(samples, config.modalities, config.image_size, ranges=args.range)


def fingerprint(path: str) -> str:
    """Of a checkpoint file: features of different models cannot be compared."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def index(args: argparse.Namespace, embedder: evaluate.Embedder) -> None:
    modalities = embedder.model.config.modalities
    if args.out.suffix != ".npz":
        raise UserError(f"--out {args.out}: expected a name as gallery.npz")
    samples = find_samples(args.folder, modalities)
    features = embedder.embed(make_split(samples, embedder, args)).numpy()
    files = [
        [str(sample.images[m][0].resolve()) if m in sample.images else "" for m in modalities]
        for sample in samples
    ]
    arrays = {
        "features": features,
        "names": np.array([sample.name for sample in samples]),
        "files": np.array(files),
        "modalities": np.array(modalities),
        "model": np.array(fingerprint(args.checkpoint)),
    }

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)

    runtime.write_atomically(args.out, write)
    counts = ", ".join(f"{sum(m in s.images for s in samples)} with {m}" for m in modalities)
    width = features.shape[1]
    print(f"{args.out}: {len(samples)} samples ({counts}), features of width {width}")


def read_gallery(path: Path, checkpoint: str, width: int) -> dict[str, np.ndarray]:
    """The arrays that `index` wrote, with this model's features. Raises UserError otherwise."""
    if not path.is_file():
        command = f"python -m extras.search CKPT index FOLDER --out {path}"
        raise UserError(f"{path}: no such file; make it by: {command}")
    names = ("features", "names", "files", "modalities", "model")
    try:
        with np.load(path, allow_pickle=False) as file:
            gallery = {name: file[name] for name in names}
        if str(gallery["model"]) != fingerprint(checkpoint):
            raise UserError(
                f"{path}: was embedded by another model than {checkpoint}; make it anew"
            )
        N, M = gallery["files"].shape
        shapes = [gallery[name].shape for name in ("features", "names", "modalities")]
        if shapes != [(N, width), (N,), (M,)]:
            raise ValueError("its arrays do not fit one another")
    except UserError:
        raise
    except Exception as error:  # numpy's and zipfile's errors have no common type
        reason = str(error)[:200]
        raise UserError(
            f"{path}: not a gallery as extras.search index writes it ({reason}); make it anew"
        ) from None
    return gallery


def read_query(words: list[str], modalities: tuple[str, ...]) -> data.Sample:
    """The sample that MODALITY=FILE words describe."""
    images: dict[str, tuple[Path, None]] = {}
    for word in words:
        modality, _, path = word.partition("=")
        if modality not in modalities or not path or modality in images:
            expected = " ".join(f"{m}=FILE" for m in modalities)
            raise UserError(f"{word}: expected some of {expected}, each once")
        images[modality] = (Path(path), None)
    ordered = {modality: images[modality] for modality in modalities if modality in images}
    return data.Sample("query", 0, 0, ordered)


def read_threshold(checkpoint: str) -> tuple[float, list[str]]:
    """The threshold that extras.verify chose for this checkpoint, and the modalities it is for."""
    path = Path(checkpoint).with_name(THRESHOLD_FILE)
    command = f"python -m extras.verify {checkpoint} --fmr 1e-2 --calibrate-on DIR"
    if not path.is_file():
        raise UserError(f"{path}: no such file; make it by {command}, or give --threshold VALUE")
    try:
        chosen = json.loads(path.read_text())
        threshold, modalities = float(chosen["threshold"]), list(chosen["modalities"])
        if not math.isfinite(threshold):
            raise ValueError(f"threshold {threshold}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a threshold of extras.verify ({error!r}); make it anew by {command}"
        ) from None
    if chosen.get("checkpoint") != fingerprint(checkpoint):
        raise UserError(
            f"{path}: was chosen for another model than {checkpoint}; make it anew by {command}"
        )
    return threshold, modalities


def query(args: argparse.Namespace, embedder: evaluate.Embedder) -> None:
    config = embedder.model.config
    gallery = read_gallery(args.gallery, args.checkpoint, embedder.model.width)
    asked = read_query(args.images, config.modalities)
    threshold = args.threshold
    if threshold is True:  # given without a value
        threshold, modalities = read_threshold(args.checkpoint)
        present = set(modalities) == set(asked.images) == set(gallery["modalities"].tolist())
        if not present or (gallery["files"] == "").any():
            names = ", ".join(modalities)
            print(f"the threshold is for samples of {names}: for others its rate is not known")
    similarity = (
        gallery["features"] @ embedder.embed(make_split([asked], embedder, args))[0].numpy()
    )
    best = np.argsort(-similarity, kind="stable")[: args.top]
    matches = np.zeros(len(similarity), bool) if threshold is None else similarity >= threshold
    verdicts = np.where(matches, "match  ", "       " if threshold is not None else "")
    print(f"{'rank':>4}  similarity  {'' if threshold is None else '       '}name")
    for position, i in enumerate(best, 1):
        print(f"{position:>4}  {similarity[i]:>10.3f}  {verdicts[i]}{gallery['names'][i]}")
    if threshold is not None:
        count = int(matches.sum()) or "none"
        print(f"{count} of {len(matches)} samples match: similarity of {threshold:.4f} or more")
    shown = [(i, similarity[i], matches[i]) for i in best]
    split = make_split([asked, *(in_gallery(gallery, i) for i in best)], embedder, args)
    draw(args.picture, split, shown)
    print(f"{args.picture}: the query and its {len(best)} best")


def in_gallery(gallery: dict, i: int) -> data.Sample:
    files = zip(gallery["modalities"], gallery["files"][i], strict=True)
    images = {str(modality): (Path(file), None) for modality, file in files if file}
    return data.Sample(str(gallery["names"][i]), 0, 0, images)


def draw(path: Path, split: data.Split, best: list[tuple]) -> None:
    """The query, then the best of the gallery (place, similarity, whether it matches: green)."""
    cells = [pictures.Cell(split[0][0], ("query", ""))]
    for position, (_, similarity, match) in enumerate(best, 1):
        name = split.samples[position].name[-24:]
        lines = (f"{position}. {name}", f"similarity {similarity:.3f}")
        colour = pictures.RIGHT if match else pictures.PLAIN
        cells.append(pictures.Cell(split[position][0], lines, colour))
    pictures.sheet([cells], split.modalities, path)


def parse() -> argparse.Namespace:
    parser = runtime.Parser(__doc__, prog="python -m extras.search")
    text = "written by train.py or prune.py, e.g. runs/synthetic/last.pt"
    parser.add_argument("checkpoint", metavar="CKPT", help=text)
    common = argparse.ArgumentParser(add_help=False)
    runtime.add_device_options(common)
    text = "reading processes (default: a core each, at most 8)"
    common.add_argument("--workers", type=whole(0), help=text)
    text = "accepted by every program; nothing is drawn here"
    common.add_argument("--seed", type=whole(0), default=0, help=text)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("index", parents=[common], help="embed a folder")
    text = "holds a folder for each modality"
    command.add_argument("folder", metavar="FOLDER", type=Path, help=text)
    command.add_argument("--out", type=Path, default=Path("gallery.npz"), help="file to write")
    command.set_defaults(run=index)
    command = commands.add_parser("query", parents=[common], help="search in it")
    text = "written by index, e.g. gallery.npz"
    command.add_argument("gallery", metavar="GALLERY", type=Path, help=text)
    text = "photos of the object, e.g. rgb=a.jpg tir=b.jpg"
    command.add_argument("images", metavar="MODALITY=FILE", nargs="+", help=text)
    command.add_argument("--top", type=whole(1), default=10, help="matches to show")
    command.add_argument("--picture", type=Path, default=Path("search.png"), help="file to draw")
    text = f"from which similarity on it is a match (without a value: {THRESHOLD_FILE}'s)"
    add = command.add_argument
    add("--threshold", nargs="?", const=True, type=real(-1, 1), metavar="VALUE", help=text)
    command.set_defaults(run=query)
    return parser.parse_args()


@runtime.program
def main() -> None:
    args = parse()
    print("settings:", {name: value for name, value in vars(args).items() if name != "run"})
    device = runtime.start(args.device)
    options = {"precision": args.precision, "workers": args.workers}
    embedder, checkpoint = evaluate.load_embedder(args.checkpoint, device, **options)
    args.range = checkpoint["settings"].get("range")  # the sensors are those of training
    args.run(args, embedder)


if __name__ == "__main__":
    main()
