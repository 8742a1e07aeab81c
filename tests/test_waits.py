"""A training step waits once for its GPU: counted on fake CUDA tensors (test_gpu.py: on one).

Fake tensors have shapes and devices but no values, so whatever needs a value is a wait. The
autograd engine wants a real GPU: the backward pass is counted on the CPU, by its operations.
"""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import losses
import runtime
import train
from model import GraFTConfig, build_model

MODALITIES = ("rgb", "nir", "tir")
HALF = dict.fromkeys(MODALITIES, (0.5, 0.5, 0.5))
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


def make_run(recipe: str, device: torch.device, tmp_path) -> tuple[train.Run, train.Objective]:
    """A run without files or data, in stage 2; 26 triplets a step."""
    args = train.parse(["--recipe", recipe, "--out", str(tmp_path), "--precision", "fp32"])
    size = dict(image_size=(32, 64), dim=32, depth=2, heads=2, encoder_heads=2, encoder_hidden=32)
    with device:
        config = GraFTConfig(**size, num_ids=78, bnneck_features=args.bnneck_features)
        model = build_model(config)
        criterion = losses.GraFTLoss(78, 32, args.triplet)
    model.to = lambda *given: model  # it is there already, and fake parameters cannot be moved
    stage = args.stages[1]
    criterion.weights(args.alpha, stage.beta, args.gamma, stage.label_smoothing)
    model.train()
    model.patch_dropout = stage.patch_dropout
    run = object.__new__(train.Run)
    run.args, run.shares, run.label_pids = args, [[slice(0, 26)]], torch.arange(78)
    run.dataset = SimpleNamespace(modalities=MODALITIES)
    run.dataset.train = SimpleNamespace(pids=torch.arange(78))
    run.embedder = evaluate.Embedder(model, HALF, HALF, device, "fp32")
    run.draw = lambda key: (torch.rand(3, 26, 7), set(MODALITIES))
    return run, train.Objective(run.embedder, criterion)


def forward(run: train.Run, objective: train.Objective) -> dict:
    """A pass as train_stage takes it, from uint8 images on the host to losses on the device."""
    images = {name: torch.zeros(78, 3, 32, 64, dtype=torch.uint8) for name in MODALITIES}
    images = runtime.to_device(images, run.embedder.device)
    (batch,) = run.passes(iter([(list(range(78)), images)]), (0, 2, 0, 0))
    return objective(batch.images, batch.labels, batch.rows)


@pytest.mark.parametrize("recipe", ["paper", "plus"])
def test_one_wait_a_step(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda x, **given: x)  # asks for values
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x, *given: x)  # no fake one exists
    device = torch.device("cuda:0")
    with FakeTensorMode(allow_non_fake_inputs=True):
        run, objective = make_run(recipe, device, tmp_path)
        optimizer = train.make_optimizer(objective, run.args.stages[1], 1e-3)
        waits = Waits()

        def read(x):
            waits.noted.append("read")
            return [0.0] * len(x)

        monkeypatch.setattr(runtime, "read", read)
        with waits:
            sums: dict = {}
            train.add_losses(sums, forward(run, objective), 1.0)
            for parameter in objective.parameters():
                parameter.grad = torch.zeros_like(parameter)
            train.status(sums, optimizer)
            optimizer.step()
            optimizer.zero_grad()
    assert waits.noted == ["read"]


@pytest.mark.parametrize("recipe", ["paper", "plus"])
def test_no_wait_in_the_backward_pass(recipe, tmp_path):
    run, objective = make_run(recipe, torch.device("cpu"), tmp_path)
    loss = forward(run, objective)["loss"]
    waits = Waits()
    with waits:
        loss.backward()
    assert not waits.noted
