"""Search for an object: embed a folder of photos once, then ask which of them show the same object.

python -m extras.search CKPT index FOLDER --out gallery.npz        FOLDER/MODALITY/NAME.jpg
python -m extras.search CKPT query gallery.npz rgb=a.jpg tir=b.jpg

The photos of one sample have the same name in the folders of its modalities; a sample may lack
some. A modality that comes again begins the next query: rgb=a.jpg rgb=b.jpg are two.

gallery.npz holds plain arrays: features (N, D), float32, L2-normalised, so that their products are
cosines; names (N,); files (N, M), "" where a modality is absent; modalities (M,); model.
"""

import argparse
import json
import math
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import evaluate
import runtime
from extras import pictures
from runtime import UserError, real, whole

DEPTH = 8  # folders below each other that are searched for photos

Photos = dict[str, Path]  # a sample's, by modality

# --- index


def find_samples(folder: Path, modalities: tuple[str, ...]) -> dict[str, Photos]:
    """The samples of FOLDER/MODALITY/**, by their path without MODALITY and suffix.

    Warns of what was not taken. Raises UserError where nothing was.
    """
    samples, not_taken = defaultdict(dict), []
    entries = data.walk(folder, DEPTH, "|".join(modalities)) if folder.is_dir() else ()
    for path, entry in entries:
        modality, _, rest = path.partition("/")
        stem, suffix = os.path.splitext(rest)
        photos = samples[data.printable(stem)]
        if suffix.lower() in data.SUFFIXES and entry.is_file() and modality not in photos:
            photos[modality] = Path(entry.path)
        else:
            twin = photos.get(modality)
            not_taken.append(path + (f" (the same sample as {twin.name})" if twin else ""))
    if not_taken:
        more = ", ..." if len(not_taken) > 3 else ""
        text = f"{len(not_taken)} files or folders were not taken: {', '.join(not_taken[:3])}{more}"
        runtime.warn(f"{folder}: {text}; files are read that end in {' '.join(data.SUFFIXES)}")
    samples = {name: photos for name, photos in sorted(samples.items()) if photos}
    if not samples:
        expected = ", ".join(modalities)
        raise UserError(
            f"{folder}: no images; expected {folder}/MODALITY/NAME.jpg, MODALITY one of {expected}"
        )
    return samples


def read_photos(photos: Photos, size: tuple[int, int]) -> dict[str, Tensor]:
    """The photos that can be read; warns of the others."""
    images = {}
    for modality, path in photos.items():
        try:
            images[modality] = evaluate.read_photo(path, size)
        except UserError as error:
            runtime.warn(str(error))
    return images


def embed(
    samples: dict[str, Photos], embedder: evaluate.Embedder
) -> tuple[dict[str, Photos], Tensor]:
    """The samples without the photos that cannot be read, and their features (N, D)."""
    size, kept, features, batch = embedder.model.config.image_size, {}, [], []
    # Threads read, not processes: each photo has its own fate, and no shared memory is needed
    read = data.in_threads(lambda photos: read_photos(photos, size), [*samples.values()], "reading")
    for (name, photos), images in zip(samples.items(), read, strict=True):
        if images:
            kept[name] = {modality: photos[modality] for modality in images}
            batch.append(images)
        if len(batch) == evaluate.BATCH_SIZE:
            features.append(embedder(batch))
            batch = []
    if unreadable := sum(map(len, samples.values())) - sum(map(len, kept.values())):
        runtime.warn(f"{unreadable} photos could not be read and are left out")
    if not kept:
        raise UserError("no photo could be read, see above")
    return kept, torch.cat([*features, embedder(batch)])


def index(args: argparse.Namespace, embedder: evaluate.Embedder) -> None:
    modalities = embedder.model.config.modalities
    runtime.check_output(args.out, "--out", (".npz",))
    samples, features = embed(find_samples(args.folder, modalities), embedder)
    files = [[str(p[m].absolute()) if m in p else "" for m in modalities] for p in samples.values()]
    arrays = {
        "features": features.numpy(),
        "names": np.array([*samples]),
        "files": np.array(files),
        "modalities": np.array(modalities),
        "model": np.array(runtime.fingerprint(args.checkpoint)),
    }

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)

    runtime.write_atomically(args.out, write)
    counts = ", ".join(f"{sum(m in p for p in samples.values())} with {m}" for m in modalities)
    print(f"{args.out}: {len(samples)} samples ({counts}), features of width {features.shape[1]}")


# --- query


def read_gallery(path: Path, checkpoint: str, width: int) -> dict[str, np.ndarray]:
    """The arrays that `index` wrote, with this model's features. Raises UserError otherwise."""
    if not path.is_file():
        command = f"python -m extras.search CKPT index FOLDER --out {path}"
        raise UserError(f"{path}: no such file; make it by: {command}")
    try:
        with np.load(path, allow_pickle=False) as file:
            gallery = {name: file[name] for name in ("features", "names", "files", "modalities")}
            model = str(file["model"])
        N, M = gallery["files"].shape
        shapes = [gallery[name].shape for name in ("features", "names", "modalities")]
        fits = shapes == [(N, width), (N,), (M,)]
    except Exception as error:  # numpy's and zipfile's errors have no common type
        raise UserError(
            f"{path}: not a gallery as extras.search index writes it ({str(error)[:200]}); make it"
            " anew"
        ) from None
    if model != runtime.fingerprint(checkpoint) or not fits:
        raise UserError(f"{path}: was embedded by another model than {checkpoint}; make it anew")
    return gallery


def read_queries(words: list[str], modalities: tuple[str, ...]) -> list[Photos]:
    """The samples that MODALITY=FILE words describe; a modality that comes again begins the next.

    Raises UserError for other words.
    """
    queries: list[Photos] = [{}]
    for word in words:
        modality, _, path = word.partition("=")
        if modality not in modalities or not path:
            expected = " ".join(f"{m}=FILE" for m in modalities)
            raise UserError(f"{word}: expected some of {expected}")
        if modality in queries[-1]:
            queries.append({})
        queries[-1][modality] = Path(path)
    return queries


def threshold_file(checkpoint: str | Path) -> Path:
    """Where extras.verify keeps the threshold that it chose for a checkpoint."""
    return runtime.checkpoint_file(checkpoint).with_name("threshold.json")


def read_threshold(checkpoint: str | Path) -> tuple[float, list[str]]:
    """The threshold that extras.verify chose for this checkpoint, and the modalities it is for."""
    path = threshold_file(checkpoint)
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
    if chosen.get("checkpoint") != runtime.fingerprint(checkpoint):
        raise UserError(
            f"{path}: was chosen for another model than {checkpoint}; make it anew by {command}"
        )
    return threshold, modalities


def query(args: argparse.Namespace, embedder: evaluate.Embedder) -> None:
    modalities = embedder.model.config.modalities
    runtime.check_output(args.json, "--json")
    runtime.check_output(args.picture, "--picture", (".png", ".jpg", ".jpeg"))
    queries = read_queries(args.images, modalities)
    gallery = read_gallery(args.gallery, args.checkpoint, embedder.model.width)
    threshold = args.threshold
    if threshold is True:  # given without a value
        threshold, expected = read_threshold(args.checkpoint)
        if (gallery["files"] == "").any() or any(set(q) != set(expected) for q in queries):
            names = ", ".join(expected)
            print(f"the threshold is for samples of {names}; for others its error rate is unknown")
    similarities = embedder(queries).numpy() @ gallery["features"].T
    results = []
    for photos, similarity in zip(queries, similarities, strict=True):
        best = []
        for i in np.argsort(-similarity, kind="stable")[: args.top]:
            files = zip(gallery["modalities"].tolist(), gallery["files"][i].tolist(), strict=True)
            found = {"name": str(gallery["names"][i]), "similarity": float(similarity[i])}
            best.append({**found, "files": {modality: file for modality, file in files if file}})
        answer = {"query": {m: str(path) for m, path in photos.items()}, "best": best}
        if threshold is not None:
            answer["matches"] = int((similarity >= threshold).sum())
            for found in best:
                found["match"] = found["similarity"] >= threshold
        print_result(answer, threshold, len(similarity))
        results.append(answer)
    if args.json:
        runtime.write_json(args.json, {"threshold": threshold, "queries": results})
        print(f"{args.json}: the results")
    if args.picture:
        draw(args.picture, results, modalities, embedder.model.config.image_size)
        print(f"{args.picture}: each query with its best")


def print_result(answer: dict, threshold: float | None, size: int) -> None:
    print("query " + " ".join(f"{m}={path}" for m, path in answer["query"].items()))
    column = "       " if threshold is not None else ""
    print(f"{'rank':>4}  similarity  {column}name")
    for rank, found in enumerate(answer["best"], 1):
        verdict = "match  " if found.get("match") else column
        print(f"{rank:>4}  {found['similarity']:>10.3f}  {verdict}{found['name']}")
    if threshold is not None:
        count = answer["matches"] or "none"
        print(f"{count} of {size} samples match: similarity of {threshold:.4f} or more")


def draw(path: Path, results: list[dict], modalities: tuple[str, ...], size) -> None:
    """A row for each query: its photos, then the best of the gallery, matches framed in colour."""
    rows = []
    for answer in results:
        row = [pictures.Cell(read_photos(answer["query"], size), ("query", ""))]
        for rank, found in enumerate(answer["best"], 1):
            lines = (f"{rank}. {found['name'][-24:]}", f"similarity {found['similarity']:.3f}")
            colour = pictures.MATCH if found.get("match") else pictures.PLAIN
            row.append(pictures.Cell(read_photos(found["files"], size), lines, colour))
        rows.append(row)
    pictures.sheet(rows, modalities, path)


# --- command line


def parse() -> argparse.Namespace:
    parser = runtime.Parser(__doc__, prog="python -m extras.search")
    text = "written by train.py or prune.py: a file, or a run's folder for its last.pt"
    parser.add_argument("checkpoint", metavar="CKPT", help=text)
    common = argparse.ArgumentParser(add_help=False)
    runtime.add_device_options(common, precision=None)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = "embed a folder; COMMAND --help lists a command's options"
    command = commands.add_parser("index", parents=[common], help=text)
    text = "holds a folder for each modality"
    command.add_argument("folder", metavar="FOLDER", type=Path, help=text)
    command.add_argument("--out", type=Path, default=Path("gallery.npz"), help="file to write")
    command.set_defaults(run=index)
    command = commands.add_parser("query", parents=[common], help="search in what was embedded")
    text = "written by index, e.g. gallery.npz"
    command.add_argument("gallery", metavar="GALLERY", type=Path, help=text)
    text = "photos of the object, e.g. rgb=a.jpg tir=b.jpg; a modality again: the next query"
    command.add_argument("images", metavar="MODALITY=FILE", nargs="+", help=text)
    add = command.add_argument
    add("--top", type=whole(1), default=10, help="how many of the best to show")
    text = "similarity from which on it is a match (without a value: the one that verify chose)"
    add("--threshold", nargs="?", const=True, type=real(-1, 1), metavar="VALUE", help=text)
    add("--json", type=Path, metavar="FILE", help="write the results")
    add("--picture", type=Path, metavar="FILE", help="draw each query with its best")
    command.set_defaults(run=query)
    return parser.parse_args()


@runtime.program
def main() -> None:
    args = parse()
    embedder = evaluate.load_embedder(args.checkpoint, args.device, precision=args.precision)
    args.run(args, embedder)


if __name__ == "__main__":
    main()
