"""Any ViT of timm serves as backbone: its tokens, its constants, its files, through the programs.

Models are timm's own, cut to two blocks; nothing is fetched.
"""

import os
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import read_json, succeeds, tiny_arguments

import evaluate
import prune
import train
from model import load_backbone
from runtime import UserError

timm = pytest.importorskip("timm")
from safetensors.torch import save_file  # noqa: E402

from extras import timm_backbone  # noqa: E402
from extras.timm_backbone import TimmViT  # noqa: E402

SMALL = "vit_small_patch14_dinov2"
KINDS = {  # name: the tokens before the patches, one of which may be ours
    SMALL: 1,
    "vit_small_patch14_reg4_dinov2": 5,
    "vit_small_patch16_dinov3": 5,
    "vit_base_patch16_clip_quickgelu_224": 1,
    "vit_base_patch16_siglip_224": 1,
    "eva02_tiny_patch14_224": 1,
    "deit3_small_patch16_224": 1,
    "deit_tiny_distilled_patch16_224": 2,
    "vit_wee_patch16_reg1_gap_256": 2,
}


@pytest.fixture(autouse=True)
def two_blocks(monkeypatch):
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=2))


def images(vit: TimmViT, count: int = 2) -> torch.Tensor:
    height, width = vit.vit.patch_embed.img_size
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def new(name: str, rows: int = 2, columns: int = 4) -> TimmViT:
    torch.manual_seed(0)
    P = timm_backbone.config_of(name)["patch_size"]
    return TimmViT(name, (rows * P, columns * P))


@pytest.mark.parametrize("name", KINDS)
def test_tokens_are_timms_and_every_weight_trains(name):
    vit = new(name)
    x = images(vit)
    tokens = vit(x)
    assert tokens.shape == (2, vit.num_tokens, vit.dim)
    assert vit.num_tokens == KINDS[name] + 8
    assert vit.prefix_tokens == KINDS[name]
    expected = vit.vit.forward_features(x)
    torch.testing.assert_close(tokens[:, -expected.shape[1] :], expected)
    if not vit.has_cls:
        torch.testing.assert_close(tokens[:, 0], expected[:, -8:].mean(1))
    tokens.square().sum().backward()  # or DistributedDataParallel would wait for the others
    assert not [name for name, weight in vit.named_parameters() if weight.grad is None]


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_timms_is_read_at_another_image_size(name, tmp_path):
    state = timm.create_model(name, num_classes=7).state_dict()
    torch.save(state, tmp_path / "file.pth")
    vit = new(name)
    dropped = vit.load(tmp_path / "file.pth")
    assert {key for key in state if key.startswith(("head", "attn_pool"))} <= {*dropped}
    assert all(key.startswith(timm_backbone.HEADS) for key in dropped)
    for key, weight in vit.vit.state_dict().items():
        if key != "pos_embed":
            assert torch.equal(weight, state.get(key, state.get(f"fc_{key}"))), key


@pytest.mark.parametrize("name", [SMALL, "vit_small_patch16_dinov3", "eva02_tiny_patch14_224"])
def test_patches_overlap_and_a_run_with_them_can_be_the_next_ones_backbone(name, tmp_path):
    P = timm_backbone.config_of(name)["patch_size"]
    torch.manual_seed(0)
    size = (P + 3 * (P // 2), 4 * P)  # not whole patches
    vit = TimmViT(name, size, stride=P // 2)
    x = images(vit)
    assert vit(x).shape == (2, vit.prefix_tokens + 4 * 7, vit.dim)
    embed = vit.vit.patch_embed
    expected = F.conv2d(x, embed.proj.weight, embed.proj.bias, P // 2)
    expected = expected.flatten(2).transpose(1, 2)  # DINOv3 keeps rows and columns apart
    torch.testing.assert_close(embed(x).reshape(expected.shape), expected)
    state = {f"backbone.{key}": weight for key, weight in vit.state_dict().items()}
    config = {"image_size": size, "stride": P // 2}
    torch.save({"model": state, "config": config}, tmp_path / "run.pt")
    same = TimmViT(name, size, stride=P // 2)
    assert load_backbone(same, tmp_path / "run.pt") == []
    assert torch.equal(same(x), vit(x))
    assert load_backbone(new(name, 3, 5), tmp_path / "run.pt") == []


def test_safetensors_are_read_or_refused(tmp_path):
    vit, file = new(SMALL), tmp_path / "model.safetensors"
    save_file(vit.vit.state_dict(), file)
    vit.vit.norm.weight.data.zero_()
    assert vit.load(file) == []
    assert vit.vit.norm.weight.all()
    file.write_bytes(file.read_bytes()[:99])
    refused("cannot be read as safetensors", vit.load, file)


def test_files_by_the_names_of_their_authors(tmp_path):
    vit, file = new("vit_small_patch14_reg4_dinov2"), tmp_path / "file.pth"
    state = vit.vit.state_dict()
    position = torch.randn(1, 1, vit.dim)
    registers = {"register_tokens": state["reg_token"], "mask_token": torch.ones(1, vit.dim)}
    meta = {key: weight for key, weight in state.items() if key != "reg_token"} | registers
    meta["cls_token"] = state["cls_token"] - position
    meta["pos_embed"] = torch.cat([position, state["pos_embed"]], 1)
    torch.save(meta, file)
    read = new(vit.name)
    assert load_backbone(read, file) == []
    torch.testing.assert_close(read.vit.state_dict(), state)

    vit = new("deit3_small_patch16_224")
    own = vit.vit.state_dict().items()
    theirs = {re.sub(r"ls(\d).gamma", r"gamma_\1", key): weight for key, weight in own}
    torch.save({"model": {**theirs, "head.weight": torch.ones(7, 384)}}, file)
    read = new(vit.name)
    assert load_backbone(read, file) == ["head.weight"]
    torch.testing.assert_close(read.vit.state_dict(), vit.vit.state_dict())


def test_frozen_with_fewer_patches_and_prunable():
    vit = new("vit_small_patch16_dinov3", 4, 4)
    x, first = images(vit), vit.prefix_tokens
    assert vit(x, 0.75).shape == (2, first + 4, vit.dim)
    vit.freeze(True)
    assert vit.train()(x, 0.75).shape == (2, first + 4, vit.dim)
    assert not vit(x).requires_grad
    assert torch.equal(vit(x), vit(x))
    assert len(vit.prunable()) == 2 * 4  # qkv, proj, fc1, fc2 of both blocks


def refused(message: str, work, *arguments) -> None:
    with pytest.raises(UserError, match=message) as caught:
        work(*arguments)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_one_line(tmp_path, monkeypatch):
    refused("not in timm .*; see vit_small_patch14_dinov2, ", TimmViT, "vit_small_dinov2", (28, 56))
    refused("not in timm .*; see ", TimmViT, "hf-hub:some/body", (28, 56))
    refused("64x128: expected multiples of the patch size, 14", TimmViT, SMALL, (64, 128))
    file, vit = tmp_path / "file.pth", new(SMALL)
    state = vit.vit.state_dict()
    torch.save({**state, "norm.weight": torch.ones(3)}, file)
    refused("norm.weight: .*torch.Size.*3", vit.load, file)
    torch.save({key: state[key] for key in state if key != "norm.bias"}, file)
    refused("Missing key.*norm.bias", vit.load, file)
    torch.save({**state, "patch_embed.proj.weight": torch.ones(384, 3, 16, 16)}, file)
    refused("has patches of 16 pixels, timm:vit_small_patch14_dinov2 of 14", vit.load, file)
    torch.save({**state, "pos_embed": torch.ones(1, 1, 3)}, file)
    refused("no weights of timm:vit_small_patch14_dinov2", vit.load, file)

    monkeypatch.undo()
    refused("no plain ViT .ResNet.; expected", TimmViT, "resnet18", (28, 56))

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    refused("timm cannot fetch vit_small_patch14_dinov2 .no network.", vit.load, "pretrained")


def test_trained_evaluated_and_pruned_with_its_own_constants(tiny_data, tmp_path):
    arguments = tiny_arguments(tiny_data, tmp_path / "run")
    at = arguments.index("--image-size")
    arguments[at : at + 3] = ["--image-size", 28, 56]
    file = tmp_path / "file.pth"
    torch.save(timm.create_model(SMALL).state_dict(), file)
    more = ["--backbone", f"timm:{SMALL}", "--backbone-weights", file, "--epoch-steps", 1]
    more += ["--patch-dropout", 0, 0.5]
    succeeds(train, *arguments, *more)
    model, checkpoint = evaluate.load_model(tmp_path / "run/last.pt")
    assert model.config.backbone == f"timm:{SMALL}"
    assert model.config.dim == 384
    assert checkpoint["mean"]["tir"] == (0.485, 0.456, 0.406)
    succeeds(evaluate, tmp_path / "run", "--json", tmp_path / "metrics.json", "--device", "cpu")
    figures = [read_json(tmp_path / file)["mAP"] for file in ("run/metrics.json", "metrics.json")]
    assert figures[0] == figures[1]
    options = ["--keep", 0.5, "--rounds", 1, "--epoch-steps", 1, "--device", "cpu"]
    succeeds(prune, tmp_path / "run", *options)
    rows = read_json(tmp_path / "run/pruned/results.json")["rows"]
    assert [round(row["kept"], 3) for row in rows] == [1.0, 0.5]
    # A run's backbone serves another run, also where its patches form another rectangle
    for size in ((28, 56), (56, 28), (56, 84)):
        vit = TimmViT(SMALL, size)
        assert vit.load(tmp_path / "run/last.pt") == []
        assert torch.equal(vit.vit.norm.weight, model.backbone.vit.norm.weight)
        assert torch.equal(vit.vit.pos_embed, model.backbone.vit.pos_embed) == (size == (28, 56))


@pytest.mark.skipif("GRAFT_DINOV2" not in os.environ, reason="no file of DINOv2-S/14's weights")
def test_the_real_dinov2_is_read(monkeypatch):
    monkeypatch.undo()
    vit = TimmViT(SMALL, (56, 112)).eval()
    assert vit.load(os.environ["GRAFT_DINOV2"]) == []
    with torch.no_grad():
        assert vit(images(vit)).isfinite().all()
