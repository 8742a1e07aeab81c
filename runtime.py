"""The machine's side of every program: errors, options, ranks, signals, draws, files.

The only room that knows torch.distributed. Under torchrun every function below serves all ranks;
without it, one process.
"""

import argparse
import functools
import json
import math
import os
import platform
import re
import signal
import sys
import time
import zipfile
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

# --- errors and exit codes


class UserError(ValueError):
    """A user's mistake: what was found, where, what was expected, what to do. Exit code 2."""


class Stopped(Exception):
    """A signal was obeyed; the message says where that left things. Exit code 128 + its number."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.code = 128 + number


def program(main):
    """Decorate a program's `main`: a mistake prints one line, and the exit code says how it ended.

    0: done; 1: another rank failed; 2: a UserError; 130: Ctrl-C; 143: SIGTERM.
    """

    @functools.wraps(main)
    def guarded(*args):
        try:
            main(*args)
            code = 0
        except UserError as error:  # a reading process hands it over behind its own traceback
            message = str(error).rpartition("runtime.UserError: ")[2].strip()
            # Before the ranks have met, a mistake in the command line is everyone's: say it once
            if dist.is_initialized() or os.environ.get("RANK", "0") == "0":
                print(f"error: {message}", file=sys.stderr)
            code = 2
        except OSError as error:  # a name too long, a folder that cannot be read, ...
            print(f"error: {error}", file=sys.stderr)
            code = 2
        except Stopped as stopped:
            print0(stopped, file=sys.stderr)
            code = stopped.code
        except KeyboardInterrupt:
            print("interrupted: what was saved before stays", file=sys.stderr)
            code = 130
        except RuntimeError as error:
            if not _lost_a_rank(error):
                raise
            print(f"error: rank {rank()}: another rank failed, see its own line", file=sys.stderr)
            code = 1
        # After a failure the other ranks may be inside a collective, and NCCL would wait for them.
        if code not in (1, 2):
            leave_ranks()
        sys.stdout.flush()
        sys.exit(code)

    return guarded


def _lost_a_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because its peer is gone; gloo raises a plain RuntimeError."""
    message = str(error)
    return world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in message)


# --- options


class Parser(argparse.ArgumentParser):
    """argparse with every default in the help, and a mistake as a UserError of one line."""

    def __init__(self, description: str | None = None, **options):
        options = {"formatter_class": _HelpFormatter, "allow_abbrev": False, **options}
        super().__init__(description=description, **options)

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=100)

    def _get_help_string(self, action: argparse.Action) -> str:
        default, text = action.default, action.help or ""
        if (
            default is None
            or default is False
            or default == argparse.SUPPRESS
            or "(default" in text
        ):
            return text
        shown = " ".join(map(str, default)) if isinstance(default, (tuple, list)) else default
        return f"{text} (default: {str(shown).replace('%', '%%')})"


def whole(low: int, high: int = 2**63 - 1):
    """An option's type: a whole number from `low` to `high`."""
    return _number(int, "a whole number", low, high)


def real(low: float = -math.inf, high: float = math.inf):
    """An option's type: a finite number from `low` to `high`."""
    return _number(float, "a number", low, high)


def _number(kind: type, name: str, low: float, high: float):
    unbounded = high in (math.inf, 2**63 - 1)
    expected = f"{name} of at least {low}" if unbounded else f"{name} from {low} to {high}"
    expected = name if unbounded and low == -math.inf else expected

    def read(text: str):
        try:
            value = kind(text)
            fits = math.isfinite(value) and low <= value <= high
        except (ValueError, OverflowError):
            fits = False
        if not fits:
            raise argparse.ArgumentTypeError(f"expected {expected}, not {text}")
        return value

    return read


def names(text: str) -> tuple[str, ...]:
    """An option's type: names separated by commas, none of them twice."""
    found = tuple(name for name in text.split(",") if name)
    if not found or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"expected different names, e.g. rgb,tir, not {text!r}")
    return found


NOUNS = {Path: "PATH", str: "FILE"}  # what the help calls an option's value


def adder(group):
    """A function that adds an option: name, default, type or choices, help, and a metavar.

    Several defaults make an option of as many values, bool a flag.
    """

    def option(name: str, default, kind, text: str, metavar=None) -> None:
        if kind is bool:
            group.add_argument(name, action="store_true", help=text)
            return
        more = {"type": kind} if callable(kind) else {"choices": kind}
        several = isinstance(default, tuple)
        if several:
            more["nargs"] = len(default)
        if several or callable(kind):
            more["metavar"] = metavar or (("STAGE1", "STAGE2") if several else NOUNS.get(kind, "N"))
        group.add_argument(name, default=default, help=text, **more)

    return option


def add_device_options(parser: argparse.ArgumentParser, precision: str | None = "auto") -> None:
    """--device and --precision; `precision` None means that a checkpoint says it."""
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    default = "" if precision else " (default: as in training)"
    text = f"auto: bf16 where the hardware multiplies it fast, else fp32{default}"
    choices = ("auto", "bf16", "fp32")
    parser.add_argument("--precision", default=precision, choices=choices, help=text)


def markdown(lines: list[list[str]]) -> str:
    """A table in Markdown; the first line is its head."""
    head, *rest = lines
    rows = [head, ["---"] * len(head), *rest]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# --- device and ranks

_agent_store: dist.Store | None = None  # torchrun's own, which outlives a restart of its ranks


def start(device: str = "auto", deterministic: bool = False) -> torch.device:
    """Join torchrun's process group, if there is one, and return this rank's device.

    `deterministic` makes a GPU add up in the same order every time (slower); CPUs do anyway.
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
        if wanted > count:  # all ranks see it alike, before they wait for one another
            raise UserError(
                f"torchrun: {wanted} processes on this machine, but {count} CUDA device(s);"
                f" use --nproc_per_node={count}, or --device cpu"
            )
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32
    if "RANK" in os.environ and not dist.is_initialized():
        _join_ranks(torch.device(device))
    return torch.device(device)


def machine(device: torch.device) -> str:
    """The name of the GPU or CPU that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _join_ranks(device: torch.device) -> None:
    global _agent_store
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        _agent_store = dist.TCPStore(address, port, world, is_master=False)
        # After a restart gloo would find the addresses of dead ranks under the old keys, and wait.
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], _agent_store)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        # Others wait while rank 0 renders or fetches; a rank that dies is torchrun's to notice
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


def print0(*args, file=None) -> None:
    """print, by rank 0 only."""
    if rank() == 0:
        print(*args, flush=True, file=file)


def rank0_first():
    """Rank 0 runs the block before the others: for work that leaves files which they then find."""
    return _first(rank() == 0)


def local_rank0_first():
    """The same for the first rank of each machine."""
    return _first(local_rank() == 0)


@contextmanager
def _first(is_first: bool):
    if not is_first:
        dist.barrier()
    yield
    if is_first and world_size() > 1:
        dist.barrier()


def local_rank() -> int:
    """The rank's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if dist.is_initialized() else 0


def restarted(folder: Path) -> bool:
    """Whether torchrun restarts the very run that it began in `folder`; notes that it has begun.

    A folder that held another run is thereby never taken for this one's.
    """
    if _agent_store is None:
        return False
    key, attempt = f"begun in {folder.resolve()}", os.environ["TORCHELASTIC_RESTART_COUNT"]
    begun = _agent_store.get(key).decode() if _agent_store.check([key]) else attempt
    return begun != attempt


def note_begun(folder: Path) -> None:
    """This launch now writes to `folder`, and may go on there after a restart; see `restarted`."""
    if _agent_store is not None and rank() == 0:
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
        _agent_store.compare_set(f"begun in {folder.resolve()}", "", attempt)


class _AllSum(torch.autograd.Function):
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


def by_rank0(compute):
    """What `compute()` returns on rank 0, on every rank: for work that would only be repeated."""
    if world_size() == 1:
        return compute()
    result = [compute() if rank() == 0 else None]
    dist.broadcast_object_list(result)
    return result[0]


def num_cores() -> int:
    """The cores that this process may use."""
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def default_workers() -> int:
    """Reading processes of a rank: the cores it has to itself, at most 8."""
    return max(1, min(8, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def available_memory() -> float:
    """Bytes that can be taken without swapping, where the system says so."""
    path = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", path.read_text()) if path.exists() else None
    return 1024 * int(found[1]) if found else math.inf


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on some rank; all of them ask at the same place."""
    if world_size() == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return all_sum(torch.tensor(float(flag), device=device)).item() > 0


def all_rows(x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """The ranks' x one below the other, differentiable; `rows` says how many each rank holds."""
    if world_size() == 1:
        return x
    before = sum(rows[: rank()])
    whole = x.new_zeros(sum(rows), *x.shape[1:])
    whole[before : before + len(x)] = x
    return all_sum(whole)


# --- what crosses to the device and back


def to_device(x: Tensor | dict[str, Tensor], device: torch.device):
    """A tensor, or each of a dict, on the device; on CUDA without a wait, from pinned memory."""
    if isinstance(x, dict):
        return {name: to_device(value, device) for name, value in x.items()}
    if device.type == "cuda" and not x.is_pinned():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def read(x: Tensor) -> list[float]:
    """The values of a small tensor; on a GPU the one place where a training step waits for it."""
    return x.tolist()


# --- precision


@functools.cache
def bf16_is_fast(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16: GPUs from Ampere on, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
        return bool(flags & {"amx_bf16", "avx512_bf16"})
    return False


def autocast(device: torch.device, precision: str):
    """Context of the forward pass; `precision` is auto (bf16 where it is fast), bf16 or fp32."""
    use_bf16 = precision == "bf16" or (precision == "auto" and bf16_is_fast(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bf16)


# --- signals


_noted: list[int] = []


@contextmanager
def deferred_signals():
    """In the block Ctrl-C and SIGTERM are only noted, see noted_signal; also a decorator.

    A second Ctrl-C ends the program at once, except under torchrun, which repeats each signal.
    """

    def note(number: int, frame) -> None:
        if _noted and number == signal.SIGINT and "RANK" not in os.environ:
            raise KeyboardInterrupt
        _noted.append(number)

    _noted.clear()
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def noted_signal() -> int:
    """The number of the first signal that was noted, or 0."""
    return _noted[0] if _noted else 0


def ignore_signals(worker: int) -> None:
    """For a reading process: a signal to the group is the main process's, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# --- draws: a function of (seed, what for) alone, so that resuming needs no stored state


def numpy_rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def torch_seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1


# --- files


def write_atomically(path: Path, write) -> None:
    """Call `write(temporary_path)`, then rename: a reader finds the old file or the new."""
    if not path.name:
        raise UserError(f"{path}: not the name of a file to write")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name, too, outlives a power failure
        os.close(folder)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        # torch.save reports a full disk as a RuntimeError
        if not isinstance(error, (OSError, RuntimeError)):
            raise
        raise UserError(
            f"{path}: cannot be written ({error}); the file before it is untouched"
        ) from None


def write_json(path: str | Path, content: dict | list) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(Path(path), lambda temporary: temporary.write_text(text))


def make_folder(path: Path, option: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be made ({error.strerror})") from None


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


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    write_atomically(path, functools.partial(torch.save, checkpoint))


def load_checkpoint(path: str | Path) -> dict:
    """Read a file of tensors and plain values, never code. Raises UserError for anything else."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a checkpoint, e.g. runs/NAME/last.pt")
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch.load's errors have no common type
        reason = str(error).split("\n")[0].split(". ")[0]
        raise UserError(f"{path}: not a checkpoint that torch can read safely ({reason})") from None
    if not isinstance(checkpoint, dict):
        kind = type(checkpoint).__name__
        raise UserError(f"{path}: holds a {kind}, not a checkpoint (a dict of tensors)")
    if isinstance(state := checkpoint.get("model"), dict):
        try:
            checkpoint["model"] = {
                name: unpack(value) if isinstance(value, dict) else value
                for name, value in state.items()
            }
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{path}: its pruned weights cannot be unpacked ({error}); use another copy"
            ) from None
    return checkpoint


def _check_archive(path: Path) -> None:
    """Refuse what torch.save does not write: compressed records, sizes beyond the file, damage."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any("/code/" in record.filename for record in records):
            convert = f"torch.jit.load({str(path)!r}, map_location='cpu').state_dict()"
            raise UserError(
                f"{path}: a TorchScript archive, which holds code; if you trust it, convert it by"
                f" torch.save(dict({convert}), FILE)"
            )
        size = sum(record.file_size for record in records)
        if size > path.stat().st_size or any(record.compress_type for record in records):
            raise UserError(
                f"{path}: its records claim {size} bytes; expected a file as torch.save writes it"
            )
        if damaged := archive.testzip():
            raise UserError(
                f"{path}: damaged (its record {damaged} has a wrong checksum); use another copy"
            )


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
