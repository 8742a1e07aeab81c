"""Search for an object: embed a folder of photos once, then ask which of them show the same object.

python -m extras.search CKPT index FOLDER --out gallery.npz        FOLDER/MODALITY/NAME.jpg
python -m extras.search CKPT query gallery.npz rgb=a.jpg tir=b.jpg

The photos of one sample have the same name in the folders of its modalities; a sample may lack
some. To ask several queries at once, list their photos one query after the other: the next query
begins where a modality comes again, so rgb=a.jpg rgb=b.jpg are two.

gallery.npz holds plain arrays: features (N, D), float32, the embeddings; names (N,); files (N, M),
"" where a modality is absent; modalities (M,); model, the sha256 of the checkpoint. The dot
product of two embeddings is their cosine similarity. Those of --recipe plus are compared by a ratio
instead: they end in M + 1 weights, one for each sensor and one for the sensors' mean.
"""

import argparse
import json
import math
import os
from collections import defaultdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import evaluate
import runtime
from extras import pictures
from runtime import UserError, real, whole

Photos = dict[str, Path]  # a sample's files by modality

# --- index


def find_samples(folder: Path, modalities: tuple[str, ...]) -> dict[str, Photos]:
    """The samples of FOLDER/MODALITY/**, by their path without MODALITY and suffix.

    Warns of files that are left out. Raises UserError if there is no image.
    """
    samples: dict[str, Photos] = defaultdict(dict)
    left_out = []
    for path, entry in data.walk(folder, 8, "|".join(modalities)):  # 8 folders deep at most
        modality, _, rest = path.partition("/")
        stem, suffix = os.path.splitext(rest)
        photos = samples[data.printable(stem)]
        if suffix.lower() not in data.SUFFIXES or not entry.is_file():
            left_out.append(path)
        elif modality in photos:
            left_out.append(f"{path} (the same sample as {photos[modality].name})")
        else:
            photos[modality] = Path(entry.path)
    if left_out:
        shown = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
        text = f"{len(left_out)} files or folders are left out: {shown}; the names of photos end in"
        runtime.warn(f"{folder}: {text} {' '.join(data.SUFFIXES)}")
    if not any(samples.values()):
        expected = f"{folder}/MODALITY/NAME.jpg, MODALITY one of {', '.join(modalities)}"
        raise UserError(f"{folder}: has no photos; expected {expected}")
    return {name: photos for name, photos in sorted(samples.items()) if photos}


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
    size, readable, features = embedder.model.config.image_size, {}, []
    read = data.in_threads(lambda photos: read_photos(photos, size), [*samples.values()], "reading")
    pairs = zip(samples, read, strict=True)
    while batch := dict(islice(pairs, evaluate.BATCH_SIZE)):
        batch = {name: images for name, images in batch.items() if images}
        for name, images in batch.items():
            readable[name] = {modality: samples[name][modality] for modality in images}
        features.append(embedder([*batch.values()]))
    if lost := sum(map(len, samples.values())) - sum(map(len, readable.values())):
        runtime.warn(f"{lost} photos could not be read and are left out")
    if not readable:
        raise UserError("none of the photos could be read; the warnings above say why")
    return readable, torch.cat(features)


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
    """The arrays that `index` wrote with this model. Raises UserError for anything else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            gallery = {name: file[name] for name in ("features", "names", "files", "modalities")}
            model = str(file["model"])
    except Exception as error:  # numpy's and zipfile's errors have no common type
        text = f"expected a file that extras.search index wrote ({str(error)[:200]})"
        raise UserError(f"{path}: {text}") from None
    if model != runtime.fingerprint(checkpoint):
        raise UserError(f"{path}: was embedded by another model; embed the photos again")
    N, M = gallery["names"].size, gallery["modalities"].size
    shapes = {name: array.shape for name, array in gallery.items()}
    if shapes != {"features": (N, width), "names": (N,), "files": (N, M), "modalities": (M,)}:
        raise UserError(f"{path}: its arrays do not fit one another; embed the photos again")
    return gallery


def read_queries(words: list[str], modalities: tuple[str, ...]) -> list[Photos]:
    """Words MODALITY=FILE -> queries; a modality that the last query has already begins the next.

    Raises UserError for other words.
    """
    queries: list[Photos] = [{}]
    for word in words:
        modality, _, path = word.partition("=")
        if modality not in modalities or not path:
            expected = ", ".join(f"{m}=FILE" for m in modalities)
            raise UserError(f"{word}: is not a photo of a query; expected one of {expected}")
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
    try:
        chosen = json.loads(path.read_text())
        threshold, reason = float(chosen["threshold"]), "it was chosen for another model"
        if not math.isfinite(threshold):  # with NaN nothing would ever match
            raise ValueError(f"threshold {threshold}")
        if chosen["checkpoint"] == runtime.fingerprint(checkpoint):
            return threshold, list(chosen["modalities"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error)
    command = f"python -m extras.verify {checkpoint} --fmr 1e-2 --calibrate-on DIR"
    text = f"{path}: holds no threshold of this model ({reason}); choose one by {command}"
    raise UserError(f"{text}, or give --threshold a value")


def query(args: argparse.Namespace, embedder: evaluate.Embedder) -> None:
    config, threshold = embedder.model.config, args.threshold
    runtime.check_output(args.json, "--json")
    runtime.check_output(args.picture, "--picture", (".png", ".jpg", ".jpeg"))
    queries = read_queries(args.images, config.modalities)
    gallery = read_gallery(args.gallery, args.checkpoint, embedder.model.embedding_width)
    if threshold is True:  # given without a value
        threshold, expected = read_threshold(args.checkpoint)
        if (gallery["files"] == "").any() or any(set(q) != set(expected) for q in queries):
            print(f"The threshold is for samples with {', '.join(expected)}; here some lack one.")
    answers = []
    features = torch.from_numpy(gallery["features"])
    similarities = embedder.model.similarity(embedder(queries), features).numpy()  # (queries, N)
    for photos, similarity in zip(queries, similarities, strict=True):
        best = []
        for i in np.argsort(-similarity, kind="stable")[: args.top]:
            files = zip(gallery["modalities"].tolist(), gallery["files"][i].tolist(), strict=True)
            sample = {"name": str(gallery["names"][i]), "similarity": float(similarity[i])}
            best.append({**sample, "files": {modality: file for modality, file in files if file}})
        answer = {"query": {m: str(path) for m, path in photos.items()}, "best": best}
        if threshold is not None:
            answer["matches"] = int((similarity >= threshold).sum())
            for sample in best:
                sample["match"] = sample["similarity"] >= threshold
        print_answer(answer, threshold, len(similarity))
        answers.append(answer)
    if args.json:
        runtime.write_json(args.json, {"threshold": threshold, "queries": answers})
        print(f"{args.json}: the results")
    if args.picture:
        draw(args.picture, answers, config)
        print(f"{args.picture}: each query and its best results")


def print_answer(answer: dict, threshold: float | None, size: int) -> None:
    print("query " + " ".join(f"{m}={path}" for m, path in answer["query"].items()))
    column = "       " if threshold is not None else ""
    print(f"{'rank':>4}  similarity  {column}name")
    for rank, sample in enumerate(answer["best"], 1):
        verdict = "match  " if sample.get("match") else column
        print(f"{rank:>4}  {sample['similarity']:>10.3f}  {verdict}{sample['name']}")
    if threshold is not None:
        count = answer["matches"] or "none"
        print(f"{count} of {size} samples match (similarity of at least {threshold:.4f})")


def draw(path: Path, answers: list[dict], config) -> None:
    """A row for each query: its photos, then the best of the gallery, matches framed in colour."""
    rows = []
    for answer in answers:
        row = [pictures.Cell(read_photos(answer["query"], config.image_size), ("query", ""))]
        for rank, sample in enumerate(answer["best"], 1):
            lines = (f"{rank}. {sample['name'][-24:]}", f"similarity {sample['similarity']:.3f}")
            colour = pictures.MATCH if sample.get("match") else pictures.PLAIN
            images = read_photos(sample["files"], config.image_size)
            row.append(pictures.Cell(images, lines, colour))
        rows.append(row)
    pictures.sheet(rows, config.modalities, path)


# --- command line


def parse() -> argparse.Namespace:
    parser = runtime.Parser(__doc__, prog="python -m extras.search")
    text = "a checkpoint of train.py or prune.py, or a run's folder"
    parser.add_argument("checkpoint", metavar="CKPT", help=text)
    common = argparse.ArgumentParser(add_help=False)
    runtime.add_device_options(common, precision=None)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = "embed a folder of photos; CKPT COMMAND --help lists a command's options"
    command = commands.add_parser("index", parents=[common], help=text)
    text = "folder that holds a folder of photos for each modality"
    command.add_argument("folder", metavar="FOLDER", type=Path, help=text)
    command.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("gallery.npz"), help="file to write"
    )
    command.set_defaults(run=index)
    command = commands.add_parser(
        "query", parents=[common], help="search among the embedded photos"
    )
    add = command.add_argument
    add("gallery", metavar="GALLERY", type=Path, help="file that index wrote")
    text = "photos of the object, e.g. rgb=a.jpg tir=b.jpg; repeat a modality for the next query"
    add("images", metavar="MODALITY=FILE", nargs="+", help=text)
    add("--top", type=whole(1), default=10, help="number of results to show")
    text = "least similarity of a match (without a value: the threshold that extras.verify chose)"
    add("--threshold", nargs="?", const=True, type=real(-1, 1), metavar="VALUE", help=text)
    add("--json", type=Path, metavar="FILE", help="write the results to FILE")
    add("--picture", type=Path, metavar="FILE", help="draw each query with its results")
    command.set_defaults(run=query)
    return parser.parse_args()


@runtime.program
def main() -> None:
    args = parse()
    embedder = evaluate.load_embedder(args.checkpoint, args.device, precision=args.precision)
    args.run(args, embedder)


if __name__ == "__main__":
    main()
