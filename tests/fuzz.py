"""Damage checkpoints and images, and read them.

Each gives the right result or one clear error, within bounded memory and time.

python tests/fuzz.py --checkpoints 500 --images 500
"""

import argparse
import random
import resource
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import evaluate
import prune
import runtime
from model import GraFTConfig, build_model

SECONDS = 20  # that a file may take
MEMORY = 2 * 2**30  # bytes that reading may add to the process's address space
KINDS = ("truncated", "flipped", "swapped", "zeroed", "grown")


def damage(content: bytes, kind: str, draw: random.Random) -> bytes:
    """The same bytes, damaged in one way.

    Cut off, with 1 to 20 bits flipped, two blocks swapped, a block zeroed, or a block repeated.
    """
    size, result = len(content), bytearray(content)
    a, b = sorted(draw.sample(range(size), 2))
    length = draw.randint(1, max(1, min(b - a, size - b, 4096)))
    if kind == "truncated":
        return content[:a]
    if kind == "flipped":
        for _ in range(draw.randint(1, 20)):
            result[draw.randrange(size)] ^= 1 << draw.randrange(8)
    elif kind == "swapped":
        result[a : a + length], result[b : b + length] = (
            content[b : b + length],
            content[a : a + length],
        )
    elif kind == "zeroed":
        result[a : a + length] = bytes(length)
    else:
        result[a:a] = content[b : b + length]
    return bytes(result)


def checkpoints(folder: Path) -> list[Path]:
    """A small one as train.py writes it, and one as prune.py does."""
    torch.manual_seed(0)
    config = GraFTConfig(
        image_size=(32, 32), dim=32, depth=2, heads=2, encoder_heads=2, encoder_hidden=32, num_ids=5
    )
    model = build_model(config)
    half = {modality: (0.5, 0.5, 0.5) for modality in config.modalities}
    about = {"config": vars(config), "settings": {"seed": 0}, "mean": half, "std": half}
    runtime.save_checkpoint(folder / "whole.pt", {**about, "model": model.state_dict()})
    prune.mask(model, prune.prunable(model) // 2)
    prune.make_permanent(model)
    prune.write(folder / "pruned.pt", model, about)
    return [folder / "whole.pt", folder / "pruned.pt"]


def images(folder: Path) -> list[Path]:
    """A mosaic as JPEG, PNG and BMP."""
    pixels = (
        np.random.default_rng(0).integers(0, 256, (8, 48, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    )
    paths = [folder / f"0501_c0001_000.{suffix}" for suffix in ("jpg", "png", "bmp")]
    for path in paths:
        Image.fromarray(pixels).save(path)
    return paths


def read_checkpoint(path: Path) -> dict:
    return evaluate.load_model(path)[0].state_dict()


def read_image(path: Path) -> dict:
    return {"size": torch.tensor(data.read_image(path).size)}


def fuzz(files: list[Path], read, count: int, seed: int) -> Counter:
    """Read `count` damaged copies: how many of each kind were refused, how many read right.

    Read right means: gave what the whole file gives.
    Raises AssertionError, naming seed and number, for any other outcome: another error, other
    tensors, too slow, too large.
    """
    outcomes: Counter = Counter()
    whole = [(path.read_bytes(), read(path)) for path in files]
    for i in tqdm(range(count), disable=None):
        draw = random.Random(f"{seed} {i}")
        which, kind = i % len(files), KINDS[i // len(files) % len(KINDS)]
        content, expected = whole[which]
        path = files[which].with_name("damaged" + files[which].suffix)
        path.write_bytes(damage(content, kind, draw))
        signal.alarm(SECONDS)
        try:
            result = read(path)
            same = result.keys() == expected.keys() and all(
                torch.equal(result[name], expected[name]) for name in result
            )
            outcomes[kind, "right" if same else "WRONG"] += 1
        except runtime.UserError as error:
            outcomes[
                kind, "refused" if path.name in str(error) and "\n" not in str(error) else "UNCLEAR"
            ] += 1
        finally:
            signal.alarm(0)
    return outcomes


def bounded() -> None:
    """From here on the process may take MEMORY more than it has.

    It ends with a traceback where a file takes too long.
    """
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", type=int, default=500, help="default: %(default)s")
    parser.add_argument("--images", type=int, default=500, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: %(default)s)")
    args = parser.parse_args()
    bounded()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for what, count, make, read in (
            ("checkpoints", args.checkpoints, checkpoints, read_checkpoint),
            ("images", args.images, images, read_image),
        ):
            outcomes = fuzz(make(Path(folder)), read, count, args.seed)
            for kind in KINDS:
                counts = {end: n for (k, end), n in sorted(outcomes.items()) if k == kind}
                print(f"{what:<12}{kind:<10}{counts}")
            failed += sum(n for (_, end), n in outcomes.items() if end.isupper())
    print(
        f"{args.checkpoints + args.images} damaged files,"
        f" {failed} neither refused in one line nor read right"
    )
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
