"""Kill training, resume it, and compare with the run that nothing disturbed.

Weights, optimizer and metrics must be equal to the bit.

python tests/faults.py --kills 20          15 at random moments, 5 while writing a checkpoint
python tests/faults.py --kills 20 --precision bf16
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tqdm import tqdm

import runtime
import train


def run(arguments: list, fault: tuple[str, float] = ("none", 0)) -> float:
    """train.py in a process of its own, killed by `fault`.

    The fault is ("time", seconds), or ("write", n): in the midst of its nth checkpoint.
    Returns the seconds it took. Raises RuntimeError where it fails without having been killed.
    """
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if fault[0] == "write":
            _die_writing(int(fault[1]))
        sys.argv = ["train.py", *map(str, arguments)]
        try:
            torch.set_num_threads(1)
            train.main()
        except SystemExit as end:
            os._exit(end.code)
        os._exit(70)
    if fault[0] == "time":
        while not os.waitid(
            os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
        ):  # it may end before
            if time.perf_counter() - began > fault[1]:
                os.kill(child, signal.SIGKILL)
                break
            time.sleep(0.002)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"train.py {' '.join(map(str, arguments))}: exit code {status}, {fault}")
    return time.perf_counter() - began


def _die_writing(n: int) -> None:
    """Let the n-th checkpoint be written half, then kill the process."""
    save, calls = torch.save, []

    def half(checkpoint, path):
        save(checkpoint, path)
        calls.append(path)
        if len(calls) == n:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


def outcome(out: Path) -> dict:
    """All that a run leaves, times and paths aside: tensors and figures by name."""
    checkpoint = runtime.load_checkpoint(out / "last.pt")
    left = {"metrics": json.loads((out / "metrics.json").read_text()), "log": log(out)}
    for part in ("model", "criterion"):
        left |= {f"{part} {name}": value for name, value in checkpoint[part].items()}
    for parameter, state in checkpoint["optimizer"].items():
        left |= {f"optimizer {parameter} {name}": value for name, value in state.items()}
    return left


def log(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    times = {"seconds", "triplets_per_second", "settings"}
    return [
        {name: value for name, value in line.items() if name not in times}
        for line in lines
        if line["event"] != "start"
    ]


def different(a: dict, b: dict) -> list[str]:
    """Names of what is not equal to the bit."""
    names = a.keys() ^ b.keys()
    for name in a.keys() & b.keys():
        same = (
            torch.equal(a[name], b[name])
            if isinstance(a[name], torch.Tensor)
            else a[name] == b[name]
        )
        names |= set() if same else {name}
    return sorted(names)


def try_faults(
    arguments: list, folder: Path, kills: int, seed: int
) -> list[tuple[tuple[str, float], list[str]]]:
    """Each fault with what became different.

    A fourth of them strikes while a checkpoint is written.
    """
    draw = random.Random(seed)
    seconds = run([*arguments, "--out", folder / "whole"])
    whole, results = outcome(folder / "whole"), []
    for i in tqdm(range(kills), disable=None):
        fault = ("write", draw.randint(1, 8)) if i % 4 == 3 else ("time", draw.uniform(0, seconds))
        out = folder / str(i)
        run([*arguments, "--out", out], fault)
        run([*arguments, "--out", out, "--resume"])
        results.append((fault, different(whole, outcome(out))))
        shutil.rmtree(out)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="default: %(default)s")
    parser.add_argument(
        "--precision", default="fp32", choices=("fp32", "bf16"), help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args()
    from conftest import run as run_program
    from conftest import tiny_arguments

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "synthetic"
        command = [
            "-m",
            "extras.synthetic",
            "--out",
            root,
            "--train-ids",
            4,
            "--test-ids",
            3,
            "--captures",
            2,
            "--workers",
            1,
        ]
        run_program(*command).check_returncode()
        arguments = [
            *tiny_arguments(root, root),
            "--precision",
            args.precision,
            "--checkpoint-every",
            2,
        ]
        results = try_faults(arguments, Path(folder), args.kills, args.seed)
    for (kind, moment), names in results:
        print(
            f"{kind:<6}{moment:>6.2f}  "
            + ("equal to the bit" if not names else f"DIFFERS: {', '.join(names[:5])}")
        )
    print(f"{sum(not names for _, names in results)} of {len(results)} equal to the bit")
    sys.exit(any(names for _, names in results))


if __name__ == "__main__":
    main()
