"""The same speed everywhere: denormals flushed, bf16 only where it is fast, one wait a step."""

from types import SimpleNamespace

import pytest
import torch
from conftest import run
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import data
import losses
import options
import runtime
import train
from model import GraFTConfig, build_model

# --- denormal numbers (with which Intel's CPUs compute 10 to 60 times slower) are flushed to zero

DENORMAL = """
import sys, torch, torch.multiprocessing as mp
from concurrent.futures import ThreadPoolExecutor

def check(where):
    tiny = torch.full((2**20,), 1e-40)  # enough numbers for several threads
    assert not (tiny * 0.5).any(), f"{where}: a parallel kernel"
    assert float(tiny[0] * 0.5) == 0, f"{where}: a single number"
    x = torch.ones(2**20, requires_grad=True)
    (x * 1e-20 * 1e-20).sum().backward()  # whose gradient is 1e-40
    assert not x.grad.any(), f"{where}: a backward pass"

def worker(index):
    check("a child process")

if __name__ == "__main__":
    torch.set_num_threads(2)
    check("the main process")
    ThreadPoolExecutor().submit(check, "a thread").result()
    if sys.argv[1] == "spawn":
        mp.spawn(worker, nprocs=1)
"""


@pytest.mark.parametrize("program", ["train", "evaluate", "prune", "data", "model"])
def test_denormals_are_flushed_before_any_thread_starts(program, tmp_path):
    script = tmp_path / "try.py"
    script.write_text(f"import {program}\n{DENORMAL}")
    done = run(script, "spawn" if program == "data" else "")
    assert done.returncode == 0, done.stderr


# --- bf16


@pytest.mark.parametrize(
    ("cpuinfo", "fast"),
    [
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16 amx_bf16 amx_tile", True),
        ("vendor_id : AuthenticAMD\nflags : avx512f avx512_bf16", True),
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16", False),  # half of fp32's rate
        ("vendor_id : AuthenticAMD\nflags : avx2", False),
        ("CPU implementer : 0x41\nFeatures : fp asimd bf16", False),
        ("", False),
    ],
)
def test_bf16_is_chosen_by_the_names_of_processors(cpuinfo, fast):
    assert runtime.cpu_multiplies_bf16_fast(cpuinfo) == fast


# --- a training step waits once for its GPU: counted on fake CUDA tensors (test_gpu.py: on one).
#     They have shapes and devices but no values, so whatever needs a value is a wait. The autograd
#     engine wants a real GPU: the backward pass is counted on the CPU, by its operations

MODALITIES = ("rgb", "nir", "tir")
NEED_VALUES = ("_local_scalar_dense", "nonzero", "masked_select", "equal.default", "unique")


class Waits(TorchDispatchMode):
    """Notes each operation that makes the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.noted: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, str(operation)
        if any(part in name for part in NEED_VALUES):
            self.noted.append(name)
        if name.startswith("aten._to_copy"):
            source = args[0].device.type
            target = torch.device(kwargs.get("device") or source).type
            waits = source == "cuda" or not kwargs.get("non_blocking")
            self.note_copy(name, source, target, waits)
        if name.startswith("aten.copy_"):
            waits = args[1].device.type == "cuda" or not (len(args) > 2 and args[2])
            self.note_copy(name, args[1].device.type, args[0].device.type, waits)
        return operation(*args, **kwargs)

    def note_copy(self, name: str, source: str, target: str, waits: bool) -> None:
        if source != target and waits:
            self.noted.append(f"{name} from {source} to {target}")


def make_dataset() -> SimpleNamespace:
    samples = [data.Sample(str(i), i // 2, 0, {}) for i in range(156)]
    half = dict.fromkeys(MODALITIES, (0.5, 0.5, 0.5))
    split = data.Split(samples, MODALITIES)
    return SimpleNamespace(train=split, modalities=MODALITIES, mean=half, std=half)


def make_run(recipe: str, device, tmp_path, dataset=None) -> tuple[train.Run, train.Objective]:
    """A run without files, in stage 2; 26 triplets a step."""
    args = options.parse(["--recipe", recipe, "--out", str(tmp_path), "--precision", "fp32"])
    size = dict(image_size=(32, 64), dim=32, depth=2, heads=2, encoder_heads=2, encoder_hidden=32)
    with device:
        model = build_model(GraFTConfig(**size, num_ids=78, fusion=args.fusion))
    run = train.Run(args, device, dataset or make_dataset(), model)
    with device:
        run.criterion = losses.GraFTLoss(78, 32, args.triplet)
    stage = args.stages[1]
    run.criterion.set_weights(args.alpha, stage.beta, args.gamma, stage.label_smoothing)
    model.train()
    model.patch_dropout = stage.patch_dropout
    return run, train.Objective(run.embedder, run.criterion)


def forward(run: train.Run, objective: train.Objective) -> dict:
    """A pass as train_epoch takes it, from uint8 images on the host to losses on the device."""
    images = {name: torch.zeros(78, 3, 32, 64, dtype=torch.uint8) for name in MODALITIES}
    images = runtime.to_device(images, run.embedder.device)
    (batch,) = run.batches.passes(iter([(list(range(78)), images)]), (0, 2, 0, 0))
    return objective(batch.images, batch.labels, batch.rank_sizes)


@pytest.mark.parametrize("recipe", ["paper", "plus"])
def test_one_wait_a_step(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda x, **given: x)  # asks for values
    monkeypatch.setattr(torch.Tensor, "unique", lambda x: torch.arange(78))  # so does this
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *given: module)  # it is there
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x, *given: x)  # no fake one exists
    waits = Waits()

    def tolist(x):
        waits.noted.append("the one wait")
        return [0.0] * len(x)

    dataset = make_dataset()
    # Before the fake mode, in which a tensor's NumPy array has no values
    sampler = train.make_sampler(options.parse(["--recipe", recipe]), dataset)
    monkeypatch.setattr(train, "make_sampler", lambda *given: sampler)
    with FakeTensorMode(allow_non_fake_inputs=True):
        run, objective = make_run(recipe, torch.device("cuda:0"), tmp_path, dataset)
        optimizer = train.make_optimizer(objective, run.args.stages[1], 1e-3)
        with waits:
            sums = {name: value.detach() for name, value in forward(run, objective).items()}
            for parameter in objective.parameters():
                parameter.grad = torch.zeros_like(parameter)
            monkeypatch.setattr(FakeTensor, "tolist", tolist, raising=False)
            train.mean_over_ranks(sums, optimizer)
            optimizer.step()
            optimizer.zero_grad()
    assert waits.noted == ["the one wait"]


@pytest.mark.parametrize("recipe", ["paper", "plus"])
def test_no_wait_in_the_backward_pass(recipe, tmp_path):
    run, objective = make_run(recipe, torch.device("cpu"), tmp_path)
    loss = forward(run, objective)["loss"]
    waits = Waits()
    with waits:
        loss.backward()
    assert not waits.noted


def test_where_no_terminal_shows_it_a_bar_waits_a_minute_and_other_ranks_draw_none(monkeypatch):
    bar = runtime.bar(range(3), "embedding", 3)
    assert (bar.delay, bar.mininterval, list(bar)) == (60, 60, [0, 1, 2])
    monkeypatch.setattr(runtime, "rank", lambda: 1)
    assert runtime.bar(range(3), "embedding", 3).disable
