"""What every program needs of the machine: errors, options, ranks, precision, signals, files.

The only module that knows torch.distributed. Its functions work under torchrun, where all ranks
call them, and without it, where one process is rank 0 of 1.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import pkgutil
import platform
import re
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.dummy import DummyProcess
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

# FFD's triplet loss vanishes to 1e-20 and below, so its gradients are denormal numbers, with which
# Intel's CPUs compute 10 to 60 times slower. On Linux threads inherit the setting from the one that
# starts them, so it comes before any kernel has run
torch.set_flush_denormal(True)

# --- errors and exit codes


class UserError(ValueError):
    """A user's mistake: what was found, where, what was expected, what to do. Exit code 2."""


class Stopped(Exception):
    """A signal was obeyed; the message says how to continue. Exit code 128 + its number."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.code = 128 + number


def program(main):
    """Decorate a program's `main`: a mistake prints one line, and the exit code says how it ended.

    0: done; 1: another rank failed; 2: a UserError; 130: Ctrl-C; 141: nobody reads the output;
    143: SIGTERM.
    """

    @functools.wraps(main)
    def guarded(*args):
        for stream in (sys.stdout, sys.stderr):  # names of files need not be valid UTF-8
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        code = _exit_code(main, *args)
        # After a failure the other ranks may be inside a collective, and NCCL would wait for them
        if code not in (1, 2):
            leave_ranks()
        with suppress(BrokenPipeError):
            sys.stdout.flush()
        # A thread that reads an image may be inside a torch kernel, where Python's own exit would
        # abort the program, or wait for a disk that hangs, for which it would wait for ever
        if not readers_ended():
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)

    return guarded


def readers_ended() -> bool:
    """Wait at most ten seconds for each thread of data.ahead; returns whether all have ended."""
    readers = [thread for thread in threading.enumerate() if isinstance(thread, DummyProcess)]
    for reader in readers:
        reader.join(10)
    return not any(reader.is_alive() for reader in readers)


def _exit_code(main, *args) -> int:
    try:
        main(*args)
        return 0
    except UserError as error:
        # Before the ranks have met, all of them find the same mistake: print it once
        if dist.is_initialized() or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a name too long, a folder that cannot be read, ...
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print0(stopped, file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt:
        print("interrupted; files written earlier are complete", file=sys.stderr)
        return 130
    except RuntimeError as error:
        # gloo reports a peer that is gone as a plain RuntimeError
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if world_size() == 1 or not lost:
            raise
        print(f"error: rank {rank()}: another rank failed, see its message", file=sys.stderr)
        return 1


def imported(name: str):
    """The module, class or function of this name: for what stands in folders, and is optional.

    The only imports that run from the top level upwards, each where it is used.
    """
    return pkgutil.resolve_name(name)


# --- options


class Parser(argparse.ArgumentParser):
    """argparse with every default in the help, and mistakes as a UserError of one line."""

    def __init__(self, description: str | None = None, **options):
        options = {"formatter_class": _HelpFormatter, "allow_abbrev": False, **options}
        super().__init__(description=description, **options)

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    # argparse's own ArgumentDefaultsHelpFormatter shows None, False and brackets of tuples, too

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=100)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "N"

    def _get_help_string(self, action: argparse.Action) -> str:
        default, text = action.default, action.help or ""
        if action.nargs == 0 or default in (None, []) or "(default" in text:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, (tuple, list)) else str(default)
        return f"{text} (default: {shown.replace('%', '%%')})"


def whole(low: int, high: int = 2**63 - 1):
    """An option's type: a whole number from `low` to `high`."""
    return functools.partial(_number, int, low, high)


def real(low: float = -math.inf, high: float = math.inf):
    """An option's type: a finite number from `low` to `high`."""
    return functools.partial(_number, float, low, high)


def _number(kind: type, low: float, high: float, text: str):
    with suppress(ValueError, OverflowError):
        value = kind(text)
        if math.isfinite(value) and low <= value <= high:
            return value
    noun = "a whole number" if kind is int else "a number"
    bounds = f" from {low} to {high}" if high < 2**62 else f" of at least {low}"
    raise argparse.ArgumentTypeError(f"expected {noun}{bounds}, not {text}")


def in_order(chosen: Iterable[str], known: tuple[str, ...], owner: str) -> tuple[str, ...]:
    """The chosen modalities in the order of the known ones. Raises UserError for none or others."""
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        found = f"has no modality {', '.join(unknown)}" if unknown else "was given no modality"
        raise UserError(f"{owner} {found}; expected some of {','.join(known)}")
    return tuple(name for name in known if name in chosen)


class Names(argparse.Action):
    """An option of different names, separated by commas, by spaces, or both."""

    def __init__(self, *args, **more):
        super().__init__(*args, nargs="+", metavar="NAME", **more)

    def __call__(self, parser, namespace, values, option=None):
        names = [name for name in ",".join(values).split(",") if name]
        if not names or len(set(names)) < len(names):
            typed = " ".join(values)
            message = f"expected different names, e.g. rgb,tir, not {typed!r}"
            raise argparse.ArgumentError(self, message)
        setattr(namespace, self.dest, tuple(names))


def add_device_options(parser: argparse.ArgumentParser, precision: str | None = "auto") -> None:
    """--device and --precision; with `precision` None the default is the checkpoint's."""
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    default = "" if precision else " (default: as in training)"
    text = f"auto: bf16 if the hardware is fast at it, else fp32 (on GPUs TF32){default}"
    choices = ("auto", "bf16", "fp32")
    parser.add_argument("--precision", default=precision, choices=choices, help=text)


def markdown(lines: list[list[str]]) -> str:
    """A table in Markdown; the first line is its head."""
    head, *rest = lines
    rows = [head, ["---"] * len(head), *rest]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# --- device and ranks


def start(device: str = "auto", deterministic: bool = False) -> torch.device:
    """Join torchrun's process group, if there is one, and return this rank's device.

    `deterministic` makes a GPU add up in the same order every time (slower); CPUs do so anyway.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device == "auto" and torch.cuda.is_available():
        device = "cuda"
    elif device == "auto":
        device = "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                "--device cuda: torch finds no CUDA device here;"
                " use --device cpu, or install a CUDA build of torch"
            )
        wanted, count = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if wanted > count:  # refused before the ranks wait for one another
            raise UserError(
                f"torchrun: {wanted} processes on this machine, but {count} CUDA device(s);"
                f" use --nproc_per_node={count}, or --device cpu"
            )
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where fp32 is asked for
    if "RANK" in os.environ and not dist.is_initialized():
        _join_ranks(torch.device(device))
    return torch.device(device)


def _join_ranks(device: torch.device) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, world, is_master=False)
        # The store outlives a restart of the ranks: under the old keys gloo would find the
        # addresses of dead ranks, and wait for them
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        # The others wait while rank 0 renders or fetches; torchrun notices a rank that dies
        timeout=timedelta(hours=2),
        device_id=device if on_gpu else None,
    )


def leave_ranks() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        time.sleep(0.1)  # torch 2.6 joins gloo's threads while holding a lock that they need
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """The rank's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if dist.is_initialized() else 0


def print0(*args, **options) -> None:
    """print, by rank 0 only."""
    if rank() == 0:
        print(*args, flush=True, **options)


def warn(message: str) -> None:
    # With its line's end in one piece: two threads may warn at once
    print0(f"warning: {message}\n", end="", file=sys.stderr)


def bar(items: Iterable, doing: str, total: int) -> tqdm:
    """tqdm's bar, of rank 0 only. Where no terminal shows it, it is written once a minute."""
    pause = 0 if sys.stderr.isatty() else 60
    options = {"mininterval": max(0.1, pause), "delay": pause, "disable": rank() > 0}
    return tqdm(items, doing, total, leave=False, **options)


@contextmanager
def rank0_first(of_machine: bool = False):
    """Rank 0, or the first rank of each machine, runs the block before the others do.

    For work whose files the others then find.
    """
    is_first = (local_rank() if of_machine else rank()) == 0
    if not is_first:
        dist.barrier()
    yield
    if is_first and world_size() > 1:
        dist.barrier()


class _AllSum(torch.autograd.Function):  # torch.distributed.nn's own is deprecated
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return _AllSum.forward(ctx, grad)  # every rank's loss depends on every rank's x


def all_sum(x: Tensor) -> Tensor:
    """Sum of x over all ranks, differentiable."""
    return _AllSum.apply(x) if world_size() > 1 else x


def all_rows(x: Tensor, rank_sizes: tuple[int, ...]) -> Tensor:
    """The ranks' x stacked along dim 0, differentiable; rank i holds `rank_sizes[i]` rows."""
    if world_size() == 1:
        return x
    before = sum(rank_sizes[: rank()])
    stacked = x.new_zeros(sum(rank_sizes), *x.shape[1:])
    stacked[before : before + len(x)] = x
    return all_sum(stacked)


def by_rank0(compute):
    """What `compute()` returns on rank 0, on every rank: for work that would only be repeated."""
    result = [compute() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(result)
    return result[0]


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on some rank; all ranks ask at the same place."""
    if world_size() == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return all_sum(torch.tensor(float(flag), device=device)).item() > 0


# --- the hardware


def num_cores() -> int:
    """The cores that this process may use."""
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def default_workers() -> int:
    """Reading threads of a rank: the cores it has to itself, at most 8."""
    return max(1, min(8, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def machine(device: torch.device) -> str:
    """The name of the GPU or CPU that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"model name\s*: (.*)", _cpuinfo())
    return found[1] if found else platform.processor() or platform.machine()


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


@functools.cache
def bf16_is_fast(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 faster than fp32: GPUs from Ampere on, some CPUs."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and cpu_multiplies_bf16_fast(_cpuinfo())


def cpu_multiplies_bf16_fast(cpuinfo: str) -> bool:
    """The rule for CPUs, by the text of /proc/cpuinfo: AMX, or AVX512-BF16 of AMD.

    Intel's AVX512-BF16 without AMX reaches half of fp32's rate. A rule on names and not a timing,
    so that a run does not depend on what else the machine was doing; extras.bench prints both
    rates.
    """
    words = set(cpuinfo.split())
    return "amx_bf16" in words or ("avx512_bf16" in words and "AuthenticAMD" in words)


def autocast(device: torch.device, precision: str):
    """Context of the forward pass; `precision` is auto (bf16 where it is fast), bf16 or fp32."""
    use_bf16 = precision == "bf16" or (precision == "auto" and bf16_is_fast(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bf16)


def to_device(x: Tensor | dict[str, Tensor], device: torch.device):
    """A tensor, or each of a dict, on the device; on CUDA without a wait, from pinned memory."""
    if isinstance(x, dict):
        return {name: to_device(value, device) for name, value in x.items()}
    if device.type == "cuda" and not x.is_pinned():
        x = x.pin_memory()
    # Not on Apple's GPUs: there the copy may read memory that is already free
    return x.to(device, non_blocking=device.type == "cuda")


# --- signals

_noted: list[int] = []
_deferring = False


@contextmanager
def deferred_signals():
    """In the block Ctrl-C and SIGTERM are only noted, see noted_signal; also a decorator.

    A second Ctrl-C ends the program at once, except under torchrun, which repeats each signal.
    Only a main thread can handle signals: in another, e.g. a notebook server's, nothing changes,
    and neither does it within another such block.
    """
    global _deferring

    def note(number: int, frame) -> None:
        if _noted and number == signal.SIGINT and "RANK" not in os.environ:
            raise KeyboardInterrupt
        _noted.append(number)

    if _deferring or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    _deferring, obeyed = True, True
    try:
        yield
        obeyed = False  # no exception: a signal may have come after the block's last look
    finally:
        _deferring, number = False, noted_signal()
        _noted.clear()
        for each, handler in before.items():
            signal.signal(each, handler)
        if number and not obeyed:
            signal.raise_signal(number)


def noted_signal() -> int:
    """The number of the first signal that was noted, or 0."""
    return _noted[0] if _noted else 0


# --- random draws: functions of (seed, purpose) alone, so that resuming needs no stored state


def numpy_rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def torch_seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1


# --- files


def write_atomically(path: Path, write) -> None:
    """Call `write(temporary_path)`, then rename: a reader finds the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "r+b") as file:  # Windows syncs no file that is open to read
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        # torch.save reports a full disk as a RuntimeError
        if not isinstance(error, (OSError, RuntimeError)):
            raise
        raise UserError(
            f"{path}: cannot be written ({error}); what it held before is unchanged"
        ) from None
    with suppress(OSError):  # Windows and some network file systems cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that the new name, too, survives a power failure
        finally:
            os.close(folder)


def write_json(path: str | Path, content: dict | list) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(Path(path), lambda temporary: temporary.write_text(text))


def make_folder(path: Path, option: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be created ({error.strerror})") from None


def check_output(path: Path | None, option: str, suffixes: tuple[str, ...] = ()) -> None:
    """Raise UserError now where a file could not be written at the end of long work."""
    if path is None:
        return
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(
            f"{option} {path}: expected a file name that ends in {' or '.join(suffixes)}"
        )
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{option} {path}: expected a file in an existing, writable folder")


def lock_folder(path: Path):
    """Make a run's folder, and lock it until the returned file is closed or the process ends.

    Raises UserError while another process holds it: two runs would mix their files.
    """
    make_folder(path, "--out")
    file = open(path / ".lock", "w")  # noqa: SIM115
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        pass
    except (BlockingIOError, PermissionError):
        raise UserError(
            f"{path}: another process is writing to this folder; choose another --out, or wait"
        ) from None
    except OSError:  # a file system without locks
        pass
    return file


class RunLog:
    """Appends one JSON object a line to `path`, with the seconds since it was opened; rank 0 only.

    Of what the file held before, the first `keep` bytes stay.
    """

    def __init__(self, path: Path, keep: int = 0):
        self.path, self.start = path, time.perf_counter()
        if rank() == 0 and path.exists():
            os.truncate(path, min(keep, path.stat().st_size))

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def write(self, event: str, **values) -> None:
        if rank() > 0:
            return
        seconds = round(time.perf_counter() - self.start, 2)
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps({"event": event, "seconds": seconds, **values}) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None


# --- checkpoint files


def checkpoint_file(path: str | Path) -> Path:
    """The file that a user means: the folder of a run stands for its last.pt."""
    path = Path(path)
    return path / "last.pt" if path.is_dir() else path


def fingerprint(path: str | Path) -> str:
    """The sha256 of a checkpoint: features of different models cannot be compared."""
    return hashlib.sha256(checkpoint_file(path).read_bytes()).hexdigest()


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    write_atomically(path, functools.partial(torch.save, checkpoint))


def load_checkpoint(path: str | Path) -> dict:
    """Read a file of tensors and plain values, never code. Raises UserError for anything else."""
    path = checkpoint_file(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a checkpoint, e.g. runs/NAME/last.pt")
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise ValueError(f"it holds a {type(checkpoint).__name__}, not a dict")
        if isinstance(state := checkpoint.get("model"), dict):
            packed = {name: value for name, value in state.items() if isinstance(value, dict)}
            state |= {name: unpack(value) for name, value in packed.items()}
    except Exception as error:  # torch.load's errors have no common type
        reason = str(error).split("\n")[0].split(". ")[0]
        raise UserError(
            f"{path}: not a checkpoint that torch can read safely ({reason}); use another copy"
        ) from None
    return checkpoint


def _check_archive(path: Path) -> None:
    """Refuse what torch.load does not look for: damage, and records larger than the file."""
    with zipfile.ZipFile(path) as archive:
        size = sum(record.file_size for record in archive.infolist())
        if size > path.stat().st_size:
            raise ValueError(f"its records claim {size} bytes, more than the file has")
        if damaged := archive.testzip():
            raise ValueError(f"its record {damaged} is damaged")


def pack(weight: Tensor) -> dict:
    """A sparse weight as a bit mask and its non-zero values: what a pruned checkpoint holds."""
    mask = weight != 0
    bits = torch.from_numpy(np.packbits(mask.numpy()))
    return {"shape": tuple(weight.shape), "mask": bits, "values": weight[mask]}


def unpack(packed: dict) -> Tensor:
    """The weight that was packed. Raises ValueError where the parts do not fit one another."""
    shape, bits, values = packed["shape"], packed["mask"].numpy(), packed["values"]
    size = math.prod(shape)
    if size > 8 * len(bits):
        raise ValueError(f"{len(bits)} bytes of mask for a weight of {size}")
    mask = torch.from_numpy(np.unpackbits(bits, count=size)).bool().view(shape)
    if mask.sum() != len(values):
        raise ValueError(f"{len(values)} values for {mask.sum()} places")
    weight = values.new_zeros(shape)
    weight[mask] = values
    return weight
