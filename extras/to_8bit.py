"""Copy a data set, with images of more than 8 bits a channel reduced to 8 by a stated range.

python -m extras.to_8bit mine                                   suggests ranges by the values
python -m extras.to_8bit mine mine8 --low 7000 --high 9500      raw values that become 0 and 255
    --only tir                                                  only in folders of this name

All other files are copied as they are. For a second range, run this again on the
copy, with --only.
"""

import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

import data
import runtime
from runtime import UserError


def read_raw(path: Path) -> np.ndarray | None:
    """The values of an image as in the file, (H, W) or (H, W, 3); None unless it has over 8 bits.

    Raises UserError for a file that cannot be read.
    """
    if path.suffix.lower() not in data.SUFFIXES:
        return None
    try:
        with Image.open(path) as image:
            if not data.is_deep(image):
                return None
            if image.mode[0] in "IF":
                return np.nan_to_num(np.asarray(image, np.float32))  # NaN: as 0
            if image.format != "PNG":
                raise ValueError(f"{image.format} with deep colour: convert it to PNG")
        # Pillow reduces deep colour to 8 bits by itself
        from torchvision.io import ImageReadMode, decode_png, read_file

        return decode_png(read_file(str(path)), ImageReadMode.RGB).permute(1, 2, 0).numpy()
    except Exception as error:  # Pillow's errors have no common type
        raise UserError(f"{path}: cannot be read ({error}); replace or remove the file") from None


def suggest(files: list[Path]) -> None:
    """Print percentiles 1 and 99 of the values, by the name of the folder that the files are in."""
    values = defaultdict(list)
    for path in files:
        if (raw := read_raw(path)) is not None:
            values[path.parent.name].append(raw.ravel()[:: raw.size // 4096 + 1])
    for name, samples in values.items():
        low, high = np.percentile(np.concatenate(samples), (1, 99))
        print(f"{name}: {len(samples)} images of more than 8 bits: --low {low:g} --high {high:g}")
    if not values:
        print("no image has more than 8 bits a channel")


@runtime.program
def main() -> None:
    parser = runtime.Parser(__doc__, prog="python -m extras.to_8bit")
    add = parser.add_argument
    add("folder", type=Path)
    add("out", type=Path, nargs="?", help="a new folder for the copy (default: suggest ranges)")
    add("--low", type=runtime.real(), help="the raw value that becomes 0")
    add("--high", type=runtime.real(), help="the raw value that becomes 255")
    add("--only", metavar="NAME", help="reduce only images in folders of this name")
    args = parser.parse_args()
    if not args.folder.is_dir():
        raise UserError(f"{args.folder}: no such folder")
    files = {path: Path(entry) for path, entry in data.walk(args.folder, 20, ".*")}
    if (args.out, args.low, args.high) == (None, None, None):
        return suggest(list(files.values()))
    if None in (args.out, args.low, args.high) or args.low >= args.high or args.out.exists():
        raise UserError("expected FOLDER NEW_FOLDER --low LOW --high HIGH, LOW below HIGH")
    unfinished = args.out.with_name(f".{args.out.name}.unfinished")

    def copy(path: str) -> bool:
        """Copy a file; returns whether it was reduced."""
        target, chosen = unfinished / path, args.only in (None, *Path(path).parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not chosen or (raw := read_raw(files[path])) is None:
            shutil.copy2(files[path], target)
            return False
        scaled = np.rint((raw - args.low) * (255 / (args.high - args.low))).clip(0, 255)
        Image.fromarray(scaled.astype(np.uint8)).save(target)
        return True

    try:
        reduced = sum(data.in_threads(copy, list(files), "copying"))
        unfinished.rename(args.out)
    finally:
        runtime.readers_ended()  # or one of them would write into the folder after it is removed
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{args.out}: {len(files)} files, of which {reduced} were reduced to 8 bits")


if __name__ == "__main__":
    main()
