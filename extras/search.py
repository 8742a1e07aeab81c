"""Search for an object: embed a folder of images once, then ask which of its samples show the object of a few photos.

python -m extras.search runs/synthetic/last.pt index FOLDER --out gallery.npz              FOLDER/MODALITY/NAME.jpg
python -m extras.search runs/synthetic/last.pt query gallery.npz rgb=a.jpg tir=b.jpg       prints and draws the best matches

A sample may lack modalities; the files of one have the same name. gallery.npz holds plain arrays: features (N, D), float32,
L2-normalised, so that their product is the cosine; names (N,); files (N, M), "" where a modality is absent; modalities (M,).
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np

import data
import evaluate
import runtime
from extras import pictures
from model import MultiModalModel
from runtime import UserError


def find(folder: Path, modalities: tuple[str, ...]) -> list[data.Sample]:
    """The samples of FOLDER/MODALITY/**, paired by their path without MODALITY and suffix, sorted by it."""
    files: dict[str, dict[str, tuple[Path, None]]] = {}
    for modality in modalities:
        for path in sorted((folder / modality).rglob("*")):
            if path.suffix.lower() in data.SUFFIXES:
                name = path.relative_to(folder / modality).with_suffix("").as_posix()
                if modality in files.setdefault(name, {}):
                    raise UserError(f"{path}: the same sample as {files[name][modality][0].name}; remove one of them")
                files[name][modality] = (path, None)
    if not files:
        raise UserError(f"{folder}: no images; expected {folder}/MODALITY/NAME.jpg, MODALITY one of {', '.join(modalities)}")
    return [data.Sample(name, 0, 0, images) for name, images in sorted(files.items())]


def embed(model: MultiModalModel, checkpoint: dict, samples: list[data.Sample], args: argparse.Namespace) -> np.ndarray:
    """Features (N, D) of samples, their images normalised as in training."""
    split = data.Split(samples, model.config.modalities, model.config.image_size)
    facts = checkpoint["mean"], checkpoint["std"]
    return evaluate.embed(model, split, *facts, next(model.parameters()).device, args.precision, args.workers).numpy()


def fingerprint(path: str) -> str:
    """Of a checkpoint file: features of different models cannot be compared."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def index(args: argparse.Namespace, model: MultiModalModel, checkpoint: dict) -> None:
    modalities = model.config.modalities
    if args.out.suffix != ".npz":
        raise UserError(f"--out {args.out}: expected a name as gallery.npz")
    samples = find(args.folder, modalities)
    features = embed(model, checkpoint, samples, args)
    files = [[str(s.images[m][0].resolve()) if m in s.images else "" for m in modalities] for s in samples]
    arrays = {
        "features": features, "names": np.array([sample.name for sample in samples]), "files": np.array(files),
        "modalities": np.array(modalities), "model": np.array(fingerprint(args.checkpoint)),
    }  # fmt: skip

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)

    runtime.write_atomically(args.out, write)
    counts = ", ".join(f"{sum(m in sample.images for sample in samples)} with {m}" for m in modalities)
    print(f"{args.out}: {len(samples)} samples ({counts}), features of width {features.shape[1]}")


def read_gallery(path: Path, checkpoint: str, width: int) -> dict[str, np.ndarray]:
    """The arrays that `index` wrote, with a model's own features. Raises UserError for anything else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; make it by: python -m extras.search CKPT index FOLDER --out {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            gallery = {name: file[name] for name in ("features", "names", "files", "modalities", "model")}
        if str(gallery["model"]) != fingerprint(checkpoint):
            raise UserError(f"{path}: was embedded by another model than {checkpoint}; make it anew")
        N, M = gallery["files"].shape
        if gallery["features"].shape != (N, width) or gallery["names"].shape != (N,) or gallery["modalities"].shape != (M,):
            raise ValueError("its arrays do not fit one another")
    except UserError:
        raise
    except Exception as error:  # numpy's and zipfile's errors have no common type
        raise UserError(f"{path}: not a gallery as search.py index writes it ({str(error)[:200]}); make it anew") from None
    return gallery


def query(args: argparse.Namespace, model: MultiModalModel, checkpoint: dict) -> None:
    if args.top < 1:
        raise UserError(f"--top {args.top}: expected at least 1")
    gallery = read_gallery(args.gallery, args.checkpoint, model.width)
    images: dict[str, tuple[Path, None]] = {}
    for word in args.images:
        modality, _, path = word.partition("=")
        if modality not in model.config.modalities or not path or modality in images:
            expected = " ".join(f"{m}=FILE" for m in model.config.modalities)
            raise UserError(f"{word}: expected some of {expected}, each once")
        images[modality] = (Path(path), None)
    ordered = {modality: images[modality] for modality in model.config.modalities if modality in images}
    sample = data.Sample("query", 0, 0, ordered)
    similarity = gallery["features"] @ embed(model, checkpoint, [sample], args)[0]
    best = np.argsort(-similarity, kind="stable")[: args.top]
    print(f"{'rank':>4}  similarity  name")
    for place, i in enumerate(best, 1):
        print(f"{place:>4}  {similarity[i]:>10.3f}  {gallery['names'][i]}")
    matches = []
    for i in best:
        files = {str(m): (Path(file), None) for m, file in zip(gallery["modalities"], gallery["files"][i], strict=True) if file}
        matches.append(data.Sample(str(gallery["names"][i]), 0, 0, files))
    split = data.Split([sample, *matches], model.config.modalities, model.config.image_size)
    cells = [pictures.Cell(split[0][0], ("query", ""))]
    for place, (i, match) in enumerate(zip(best, matches, strict=True), 1):
        cells.append(pictures.Cell(split[place][0], (f"{place}. {match.name[-24:]}", f"similarity {similarity[i]:.3f}")))
    pictures.sheet([cells], model.config.modalities, args.picture)
    print(f"{args.picture}: the query and its {len(best)} best")


@runtime.program
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CKPT", help="written by train.py or prune.py, e.g. runs/synthetic/last.pt")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    common.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="default: %(default)s")
    common.add_argument("--workers", type=int, default=2, help="reading processes (default: %(default)s)")
    common.add_argument("--seed", type=int, default=0, help="unused: nothing is drawn by chance")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("index", parents=[common], help="embed a folder")
    command.add_argument("folder", metavar="FOLDER", type=Path, help="holds a folder for each modality")
    command.add_argument("--out", type=Path, default=Path("gallery.npz"), help="default: %(default)s")
    command.set_defaults(run=index)
    command = commands.add_parser("query", parents=[common], help="search in it")
    command.add_argument("gallery", metavar="GALLERY", type=Path, help="written by index, e.g. gallery.npz")
    command.add_argument("images", metavar="MODALITY=FILE", nargs="+", help="photos of the object, e.g. rgb=a.jpg tir=b.jpg")
    command.add_argument("--top", type=int, default=10, help="matches (default: %(default)s)")
    command.add_argument("--picture", type=Path, default=Path("search.png"), help="default: %(default)s")
    command.set_defaults(run=query)
    args = parser.parse_args()
    print("settings:", {name: value for name, value in vars(args).items() if name != "run"})
    model, checkpoint = evaluate.load_model(args.checkpoint)
    args.run(args, model.to(runtime.start(args.device)), checkpoint)


if __name__ == "__main__":
    main()
