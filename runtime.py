"""The machine's side of every program: device, process group, draws, checkpoint files, run log, errors.

The only room that knows torch.distributed. Under torchrun every function below serves all ranks; without it, one process.
"""

import functools
import json
import math
import os
import signal
import sys
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


class UserError(ValueError):
    """A user's mistake: says what was found, where, what was expected and what to do. Printed as it is, exit code 2."""


class Stopped(Exception):
    """A signal was obeyed: `message` says where that left things; exit code 128 + the signal's number."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.code = 128 + number


def program(main):
    """Decorate a program's `main`: one line and exit code 2 for a UserError; exit code 130 for Ctrl-C, 143 for SIGTERM."""

    @functools.wraps(main)
    def guarded(*args):
        try:
            main(*args)
            code = 0
        except UserError as error:  # a DataLoader's worker hands it over with its traceback in front
            print(f"error: {str(error).rpartition('runtime.UserError: ')[2].strip()}", file=sys.stderr)
            code = 2
        except Stopped as stopped:
            print0(stopped, file=sys.stderr)
            code = stopped.code
        except KeyboardInterrupt:
            print("interrupted: what was saved before stays", file=sys.stderr)
            code = 130
        finally:
            stop()
        sys.exit(code)

    return guarded


# --- device and process group


def start(device: str = "auto", deterministic: bool = False) -> torch.device:
    """Join torchrun's process group, if there is one, and return this rank's device: cuda, mps or cpu.

    `deterministic` makes a GPU add up in the same order every time (slower); CPUs do anyway.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu, or install a CUDA build of torch")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun's store outlives its workers: after a restart gloo would wait for ranks that are gone, by their old keys
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, is_master=False)
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", store=store, rank=rank, world_size=world)
    return torch.device(device)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        time.sleep(0.1)  # torch 2.6 joins gloo's threads with the interpreter's lock held, which they may still need
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*args, file=None) -> None:
    """print, by rank 0 only."""
    if rank() == 0:
        print(*args, flush=True, file=file)


@contextmanager
def deferred_signals():
    """Ctrl-C and SIGTERM in the block are noted only; yields a function that returns the noted signal's number, or 0.

    A second Ctrl-C ends the program at once, except under torchrun, which hands each on more than once.
    """
    noted: list[int] = []

    def note(number: int, frame) -> None:
        if noted and number == signal.SIGINT and "RANK" not in os.environ:
            raise KeyboardInterrupt
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: noted[0] if noted else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def rank0_first():
    """Rank 0 runs the block before the others do: for work that leaves files which the others then find."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world_size() > 1:
        dist.barrier()


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return _AllSum.forward(ctx, grad)  # every rank's loss depends on every rank's x


def all_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum of x over all ranks, differentiable."""
    return _AllSum.apply(x) if world_size() > 1 else x


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bf16 matrix products have hardware: GPUs from Ampere on, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        return cpuinfo.exists() and not {"amx_bf16", "avx512_bf16"}.isdisjoint(cpuinfo.read_text().split())
    return False


def autocast(device: torch.device, precision: str):
    """Context for the forward pass; `precision` is auto (bf16 where it is fast), bf16 or fp32."""
    use_bf16 = precision == "bf16" or (precision == "auto" and bf16_is_fast(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bf16)


# --- draws: a function of (seed, what for) alone, so nothing needs to be stored to go on where a run stopped


def numpy_rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def torch_seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1


# --- files


def write_atomically(path: Path, write) -> None:
    """Call `write(temporary_path)`, then move the file to `path`: whoever reads `path` finds the old file or the new."""
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
        if not isinstance(error, (OSError, RuntimeError)):  # torch.save reports a full disk as a RuntimeError
            raise
        raise UserError(f"{path}: cannot be written ({error}); the file before it is untouched") from None


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    write_atomically(path, functools.partial(torch.save, checkpoint))


def load_checkpoint(path: str | Path) -> dict:
    """Read a file of tensors and plain values; code in it is never run. Raises UserError for anything else."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a checkpoint, e.g. runs/NAME/last.pt")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as records:
                sizes = sum(record.file_size for record in records.infolist())
                if sizes > path.stat().st_size or any(record.compress_type for record in records.infolist()):
                    raise UserError(f"{path}: its records claim {sizes} bytes; expected a file as torch.save writes it")
                if damaged := records.testzip():
                    raise UserError(f"{path}: damaged (its record {damaged} has a wrong checksum); use another copy")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch.load's errors have no common type
        reason = str(error).split("\n")[0].split(". ")[0]
        raise UserError(f"{path}: not a checkpoint that torch can read safely ({reason})") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint (a dict of tensors)")
    if isinstance(state := checkpoint.get("model"), dict):
        try:
            checkpoint["model"] = {name: unpack(value) if isinstance(value, dict) else value for name, value in state.items()}
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path}: its pruned weights cannot be unpacked ({error}); use another copy") from None
    return checkpoint


def pack(weight: torch.Tensor) -> dict:
    """A weight of which much is zero, as a bit mask and the values that are not: what a pruned checkpoint holds."""
    mask = weight != 0
    return {"shape": tuple(weight.shape), "mask": torch.from_numpy(np.packbits(mask.numpy())), "values": weight[mask]}


def unpack(packed: dict) -> torch.Tensor:
    """The weight that was packed. Raises ValueError where the parts do not fit one another."""
    shape, bits, values = packed["shape"], packed["mask"].numpy(), packed["values"]
    if math.prod(shape) > 8 * len(bits):
        raise ValueError(f"{len(bits)} bytes of mask for a weight of {math.prod(shape)}")
    mask = torch.from_numpy(np.unpackbits(bits, count=math.prod(shape))).bool().view(shape)
    if mask.sum() != len(values):
        raise ValueError(f"{len(values)} values for {mask.sum()} places")
    weight = values.new_zeros(shape)
    weight[mask] = values
    return weight


def write_json(path: str | Path, content: dict) -> None:
    write_atomically(Path(path), lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


class RunLog:
    """Appends one JSON object a line to `path`, with the seconds since the log was opened; by rank 0 only.

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
        if rank() == 0:
            line = {"event": event, "seconds": round(time.perf_counter() - self.start, 2), **values}
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None
