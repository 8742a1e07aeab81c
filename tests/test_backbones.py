"""The backbones of CLIP, DINOv2, DeiT III and AugReg equal timm's, from every file people have.

Files are made of timm's weights, by the names that each release gives them.
"""

import json
import sys
from argparse import Namespace
from dataclasses import asdict, fields

import pytest
import timm
import torch
from conftest import call, tiny_arguments
from safetensors.torch import save_file
from torch import nn

import evaluate
import model
import pretrained
import prune
import train
from model import BACKBONES, GraFTConfig, Traits, ViT, build_model, load_backbone
from runtime import UserError

TIMM = {  # what timm calls them, and the switches of its VisionTransformer
    "clip-b16": (
        "vit_base_patch16_clip_quickgelu_224",
        dict(pre_norm=True, norm_layer=nn.LayerNorm, act_layer="quick_gelu"),
    ),
    "openclip-b16": ("vit_base_patch16_clip_224", dict(pre_norm=True, norm_layer=nn.LayerNorm)),
    "dinov2-s14": ("vit_small_patch14_dinov2", dict(init_values=1.0)),
    "dinov2-b14": ("vit_base_patch14_dinov2", dict(init_values=1.0)),
    "dinov2-s14-reg4": (
        "vit_small_patch14_reg4_dinov2",
        dict(init_values=1.0, reg_tokens=4, no_embed_class=True),
    ),
    "dinov2-b14-reg4": (
        "vit_base_patch14_reg4_dinov2",
        dict(init_values=1.0, reg_tokens=4, no_embed_class=True),
    ),
    "deit3-s16": ("deit3_small_patch16_224", dict(init_values=1.0, no_embed_class=True)),
    "deit3-b16": ("deit3_base_patch16_224", dict(init_values=1.0, no_embed_class=True)),
    "augreg-s16": ("vit_small_patch16_224", {}),
    "augreg-b16": ("vit_base_patch16_224", {}),
}
# One of each kind
KINDS = ("clip-b16", "openclip-b16", "dinov2-b14", "dinov2-b14-reg4", "deit3-b16", "augreg-b16")
D, DEPTH, HEADS = 48, 2, 3


def patch(name: str) -> int:
    return BACKBONES[name].get("patch_size", 16)


def traits(name: str) -> Traits:
    names = {field.name for field in fields(Traits)}
    return Traits(**{key: value for key, value in BACKBONES[name].items() if key in names})


def ours(name: str, rows: int = 4, columns: int = 4) -> ViT:
    """Of the kind of a row of BACKBONES, but tiny, for images of so many patches."""
    P = patch(name)
    sizes = ((rows * P, columns * P), P, D, DEPTH, HEADS, False)
    return ViT(*sizes, traits=traits(name)).eval()


@torch.no_grad()
def timms(name: str) -> nn.Module:
    """The same in timm, 4 x 4 patches, with random weights that leave no switch without effect."""
    P, sizes = patch(name), dict(embed_dim=D, depth=DEPTH, num_heads=HEADS, num_classes=7)
    torch.manual_seed(0)
    theirs = timm.models.VisionTransformer(4 * P, P, **sizes, **TIMM[name][1])
    generator = torch.Generator().manual_seed(1)
    for parameter in theirs.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return theirs.eval()


def images(vit: ViT) -> torch.Tensor:
    return torch.randn(2, 3, *vit.image_size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", TIMM)
def test_every_row_has_the_sizes_of_timms(name):
    with torch.device("meta"):
        theirs = timm.create_model(TIMM[name][0], img_size=224)
        vit = build_model(GraFTConfig(**BACKBONES[name])).backbone
    expected = {key: w.shape for key, w in theirs.state_dict().items() if "head" not in key}
    assert {key: w.shape for key, w in vit.state_dict().items()} == expected
    block, own = theirs.blocks[0], vit.blocks[0]
    assert own.norm1.eps == own.norm2.eps == vit.norm.eps == block.norm1.eps == theirs.norm.eps
    assert own.attn.heads == block.attn.num_heads
    assert vit.embed_class != theirs.no_embed_class
    assert vit.prefix_tokens == theirs.num_prefix_tokens
    x = torch.linspace(-4, 4, 99)
    torch.testing.assert_close(own.mlp.activation(x), block.mlp.act(x))


@pytest.mark.parametrize("grid", [(4, 4), (3, 6)], ids=["native", "resized"])
@pytest.mark.parametrize("name", KINDS)
def test_tokens_equal_timms(name, grid, tmp_path):
    theirs, vit = timms(name), ours(name, *grid)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    assert load_backbone(vit, tmp_path / "timm.pth") == ["head.weight", "head.bias"]
    theirs.set_input_size(vit.image_size)  # bicubic, antialiased
    x = images(vit)
    with torch.no_grad():
        expected = theirs.forward_features(x)
        torch.testing.assert_close(vit(x), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.5


# --- files


def renamed(state: dict, names: dict[str, str], prefix: str = "") -> dict:
    """Timm's names -> others, in this order; heads are not theirs."""
    out = {}
    for name, weight in state.items():
        if not name.startswith("head"):
            for old, new in names.items():
                name = name.replace(old, new)
            out[prefix + name] = weight
    return out


def parted(state: dict, query: str, key: str, value: str) -> dict:
    """One weight of queries, keys and values -> three."""
    out = {}
    for name, weight in state.items():
        if "attn.qkv" in name:
            for part, w in zip((query, key, value), weight.chunk(3), strict=True):
                out[name.replace("attn.qkv", part)] = w.clone()
        else:
            out[name] = weight
    return out


def open_clip(state: dict) -> dict:
    names = {
        "cls_token": "class_embedding", "pos_embed": "positional_embedding", "norm_pre": "ln_pre",
        "patch_embed.proj": "conv1", "blocks.": "transformer.resblocks.", "norm1": "ln_1",
        "norm2": "ln_2", "norm.": "ln_post.", "attn.qkv.": "attn.in_proj_",
        "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    }  # fmt: skip
    out = renamed(state, names, "visual.")
    out["visual.class_embedding"] = out["visual.class_embedding"][0, 0].clone()
    out["visual.positional_embedding"] = out["visual.positional_embedding"][0]
    text = {
        "visual.proj": (D, 32), "positional_embedding": (77, 32), "text_projection": (32, 32),
        "logit_scale": (), "transformer.resblocks.0.ln_1.weight": (32,),
        "transformer.resblocks.0.attn.in_proj_weight": (96, 32), "token_embedding.weight": (9, 32),
        "ln_final.weight": (32,), "context_length": (),
    }  # fmt: skip
    return out | {name: torch.ones(shape) for name, shape in text.items()}


def hf_clip(state: dict, whole: bool = True) -> dict:
    names = {
        "cls_token": "embeddings.class_embedding", "norm.": "post_layernorm.",
        "pos_embed": "embeddings.position_embedding.weight", "norm_pre": "pre_layrnorm",
        "patch_embed.proj": "embeddings.patch_embedding", "blocks.": "encoder.layers.",
        ".norm": ".layer_norm", "attn.proj": "self_attn.out_proj",
    }  # fmt: skip
    parts = [f"self_attn.{part}_proj" for part in "qkv"]
    prefix = "vision_model." if whole else ""
    out = renamed(parted(state, *parts), names, prefix)
    for name in ("class_embedding", "position_embedding.weight"):
        name = f"{prefix}embeddings.{name}"
        out[name] = out[name].squeeze(0).squeeze(0).clone()
    if whole:
        others = ("logit_scale", "text_model.final_layer_norm.bias", "visual_projection.weight")
        others += ("vision_model.embeddings.position_ids",)
        out |= {name: torch.ones(1) for name in others}
    return out


def dinov2(state: dict) -> dict:
    """As released: a position of CLS, which timm has added to its CLS token."""
    out = {**renamed(state, {"reg_token": "register_tokens"}), "mask_token": torch.ones(1, D)}
    if "register_tokens" in out:
        position = torch.randn(1, 1, D)
        out["cls_token"] = out["cls_token"] - position
        out["pos_embed"] = torch.cat([position, out["pos_embed"]], 1)
    return out


def hf_dinov2(state: dict) -> dict:
    names = {
        "cls_token": "embeddings.cls_token", "register_tokens": "embeddings.register_tokens",
        "mask_token": "embeddings.mask_token", "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection", "blocks.": "encoder.layer.",
        "attn.proj": "attention.output.dense", "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
    }  # fmt: skip
    parts = [f"attention.attention.{part}" for part in ("query", "key", "value")]
    out = renamed(parted(dinov2(state), *parts), names)
    return {f"layer{n}" if n.startswith("norm.") else n: weight for n, weight in out.items()}


def deit3(state: dict) -> dict:
    out = renamed(state, {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"})
    return {"model": {**out, "head.weight": torch.ones(7, D)}}


@pytest.mark.parametrize("name, release, ending, num_dropped", [
    ("clip-b16", dict, "safetensors", 2),
    ("dinov2-b14-reg4", dict, "safetensors", 2),
    ("clip-b16", open_clip, "pt", 9),
    ("openclip-b16", open_clip, "safetensors", 9),
    ("clip-b16", hf_clip, "safetensors", 4),
    ("clip-b16", lambda state: hf_clip(state, whole=False), "safetensors", 0),
    ("dinov2-b14", dinov2, "pth", 1),
    ("dinov2-b14-reg4", dinov2, "pth", 1),
    ("dinov2-b14", hf_dinov2, "safetensors", 1),
    ("dinov2-b14-reg4", hf_dinov2, "bin", 1),
    ("deit3-b16", deit3, "pth", 1),
])  # fmt: skip
def test_every_release_reads_back_to_the_same_weights(name, release, ending, num_dropped, tmp_path):
    state, vit = timms(name).state_dict(), ours(name)
    file, path = release(state), tmp_path / f"file.{ending}"
    if ending == "safetensors":
        save_file({key: weight.contiguous() for key, weight in file.items()}, path)
    else:
        torch.save(file, path)
    dropped = load_backbone(vit, path)
    assert len(dropped) == num_dropped and set(dropped) <= set(file.get("model", file))
    for key, weight in vit.state_dict().items():
        torch.testing.assert_close(weight, state[key], atol=1e-6, rtol=0, msg=key)


def refused(vit: ViT, path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_backbone(vit, path)
    assert "\n" not in str(caught.value)


def test_a_weight_that_is_missing_left_over_or_of_another_shape_is_named(tmp_path):
    vit, path = ours("clip-b16"), tmp_path / "file.safetensors"
    state = {name: w.contiguous() for name, w in hf_clip(timms("clip-b16").state_dict()).items()}

    def refused_with(changes: dict, message: str) -> None:
        changed = {name: w for name, w in {**state, **changes}.items() if w is not None}
        save_file(changed, path)
        refused(vit, path, message)

    key = "vision_model.encoder.layers.1.self_attn.k_proj.bias"
    refused_with(
        {key: None}, r"lacks blocks\.1\.attn\.qkv\.bias, has also blocks\.1\.attn\.q\.bias"
    )
    refused_with({key: torch.ones(3)}, r"blocks\.1\.attn\.qkv\.bias has the shape \(99,\)")
    key = key.replace("bias", "weight")
    refused_with({key: torch.ones(3, 3)}, "its weights do not fit one another")
    refused_with({"vision_model.mask_token": torch.ones(3)}, "has also mask_token")
    refused_with({"vision_model.pre_layrnorm.bias": None}, r"lacks norm_pre\.bias")


def test_the_backbone_that_a_file_fits_is_named():
    with torch.device("meta"):
        vits = {name: build_model(GraFTConfig(**row)).backbone for name, row in BACKBONES.items()}
    message = "lacks dist_token, has also .* fits --backbone dinov2-s14-reg4$"
    with pytest.raises(UserError, match=message):
        names = vits["deit-b"].state_dict()
        pretrained.check_names(vits["dinov2-s14-reg4"].state_dict(), names, "file")
    assert pretrained.fitting({"cls_token": torch.ones(1)}).startswith("no --backbone has")


def test_safetensors_that_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "file.safetensors"
    refused(ours("augreg-b16"), path, "no such file")
    path.write_bytes(b"\x08" + bytes(7) + b"no json!")
    refused(ours("augreg-b16"), path, "not a safetensors file")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refused(ours("augreg-b16"), path, r"needs the package safetensors: pip install safetensors$")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_is_refused_and_its_conversion_reads(tmp_path):
    """OpenAI's ViT-B-16.pt: in float16, with code, the text tower and numbers in it."""

    class Tower(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    vit, archive = ours("clip-b16"), nn.Module()
    for name, weight in open_clip(timms("clip-b16").state_dict()).items():
        inside = archive
        *parents, last = name.split(".")
        for parent in parents:
            if not hasattr(inside, parent):
                inside.add_module(parent, Tower())
            inside = getattr(inside, parent)
        inside.register_buffer(last, weight.half())
    archive.forward = Tower().forward
    archive.__class__ = type("CLIP", (Tower,), {})
    torch.jit.save(torch.jit.trace(archive, torch.ones(1)), tmp_path / "ViT-B-16.pt")
    with pytest.raises(UserError, match="TorchScript archive") as caught:
        load_backbone(vit, tmp_path / "ViT-B-16.pt")
    convert = str(caught.value).split("convert it by ")[1]
    FILE = tmp_path / "clip.pth"
    exec(convert, {"torch": torch, "FILE": FILE})  # the line does what it says
    load_backbone(vit, FILE)
    expected = timms("clip-b16").state_dict()["blocks.1.attn.qkv.weight"]
    torch.testing.assert_close(vit.blocks[1].attn.qkv.weight, expected, atol=1e-3, rtol=0)


# --- as part of GraFT


def graft(name: str, **changes):
    """GraFT on a tiny backbone with random gammas."""
    torch.manual_seed(0)
    size = dict(image_size=(2 * patch(name), 4 * patch(name)), dim=D, depth=DEPTH, heads=HEADS)
    more = dict(encoder_heads=4, encoder_hidden=32, num_ids=5)
    config = GraFTConfig(**{**BACKBONES[name], **size, **more, **changes})
    built = build_model(config).eval()
    for module in built.modules():
        if isinstance(module, model.LayerScale):
            nn.init.normal_(module.gamma)
    return built


def photos(built, batch: int = 3) -> dict:
    generator, size = torch.Generator().manual_seed(1), built.config.image_size
    return {m: torch.randn(batch, 3, *size, generator=generator) for m in built.config.modalities}


def test_attention_maps_lie_on_the_patches_behind_the_registers():
    built = graft("dinov2-b14-reg4", fusion_tokens=2)
    with torch.no_grad():  # all keys alike: each of 2 + 1 + 4 + 8 tokens gets the same
        for encoder in built.encoders.values():
            encoder.self_attn.in_proj_weight[D : 2 * D] = 0
    maps = built.attention(photos(built))
    torch.testing.assert_close(maps["tir"], torch.full((3, 2, 4), 1 / 15))


def test_data_tokens_are_counted_with_the_registers():
    built = graft("dinov2-b14-reg4", data_token=12)  # CLS, 4 registers, 8 patches
    tokens = built.extract(photos(built))
    assert tokens.shape == (3, 3, 13, D) and built.backbone.prefix_tokens == 5
    with pytest.raises(UserError, match="data token 13: expected 0 to 12"):
        graft("dinov2-b14-reg4", data_token=13)


@pytest.mark.parametrize("name", KINDS)
def test_everything_trains_and_checkpointing_changes_no_gradient(name):
    gradients = []
    for checkpointing in (False, True):
        built = graft(name, dropout=0.0).train()
        built.backbone.checkpointing = checkpointing
        out = built(photos(built))
        (built.classify(out.fusion)[:, 0].sum() + out.data[1, :7].square().sum()).backward()
        gradients.append({n: p.grad for n, p in built.backbone.named_parameters()})
        assert all(grad is not None and grad.any() for grad in gradients[-1].values())
    torch.testing.assert_close(*gradients)
    built.freeze_backbone(True)
    assert not built.extract(photos(built)).requires_grad


@pytest.mark.parametrize("name", ["clip-b16", "dinov2-b14-reg4"])
def test_patch_dropout_keeps_the_tokens_before_the_patches(name):
    vit = ViT((64, 64), 16, D, 0, HEADS, False, traits=traits(name))  # no blocks
    x, first = torch.randn(2, 3, 64, 64), vit.prefix_tokens
    whole, some = vit(x), vit(x, 0.75)
    assert some.shape == (2, first + 4, D)  # of 16 patches
    torch.testing.assert_close(some[:, :first], whole[:, :first])


@pytest.mark.parametrize("name", ["clip-b16", "dinov2-b14-reg4", "deit3-b16"])
def test_a_smaller_model_computes_what_the_large_one_does_without_the_removed_groups(name):
    built = graft(name)
    smaller = prune.shrink(built, prune.prunable(built) // 2).eval()
    assert smaller.num_parameters() < built.num_parameters()
    d, state = D // HEADS, smaller.state_dict()
    for i, block in enumerate(built.backbone.blocks):
        kept = {tuple(row.tolist()) for row in state[f"backbone.blocks.{i}.mlp.fc1.weight"]}
        gone = [tuple(row.tolist()) not in kept for row in block.mlp.fc1.weight]
        block.mlp.fc2.weight.data[:, gone] = 0
        kept = {tuple(row.tolist()) for row in state[f"backbone.blocks.{i}.attn.qkv.weight"]}
        for head in range(HEADS):
            if tuple(block.attn.qkv.weight[head * d].tolist()) not in kept:
                block.attn.proj.weight.data[:, head * d : (head + 1) * d] = 0
    with torch.no_grad():
        expected = built(photos(built)).fusion
        torch.testing.assert_close(smaller(photos(built)).fusion, expected, atol=1e-5, rtol=1e-4)


def test_masks_and_a_packed_checkpoint(tmp_path):
    built = graft("dinov2-b14-reg4")
    prune.mask(built, prune.prunable(built) // 2)
    prune.make_permanent(built)
    facts = dict.fromkeys(built.config.modalities, (0.5, 0.5, 0.5))
    about = {"config": asdict(built.config), "settings": {}, "mean": facts, "std": facts}
    prune.write(tmp_path / "pruned.pt", built, about)
    loaded, _ = evaluate.load_model(tmp_path / "pruned.pt")
    assert prune.kept(loaded) == prune.prunable(built) // 2
    assert torch.equal(loaded(photos(built)).fusion, built(photos(built)).fusion)


@pytest.mark.parametrize("distilled", [True, False])
def test_a_config_of_before_builds_the_same_model(distilled):
    size = dict(image_size=(32, 64), dim=D, depth=1, heads=HEADS, distilled=distilled)
    config = GraFTConfig(**size)
    new = {field.name for field in fields(Traits)}
    old = {name: value for name, value in asdict(config).items() if name not in new}
    assert GraFTConfig(**old) == config
    names = [name for name in build_model(GraFTConfig(**old)).backbone.state_dict()]
    block = [f"blocks.0.{part}.{kind}" for part in (
        "norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"
    ) for kind in ("weight", "bias")]  # fmt: skip
    first = ["cls_token", "dist_token", "pos_embed"] if distilled else ["cls_token", "pos_embed"]
    patches = ["patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert names == [*first, *patches, *block, "norm.weight", "norm.bias"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(activation="relu"), "activation 'relu': expected gelu or quick_gelu"),
        (dict(registers=1001), "1001 blocks, fusion tokens, registers"),
        (dict(norm_eps=float("nan")), "norm_eps nan"),
        (dict(layer_scale=1), "layer_scale 1: expected a bool"),
        (dict(image_size=(128, 256)), "128x256: patch 14 does not divide.*nearest is 126x252"),
    ],
)
def test_impossible_models_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        graft("dinov2-b14", **changes)


# --- options


def config_of(*options: str) -> GraFTConfig:
    pids = torch.tensor([0, 1])
    dataset = Namespace(train=Namespace(pids=pids), modalities=("rgb", "nir"))
    args = train.parse(["--dataset", "rgbnt100", *options])
    args.modalities = dataset.modalities
    return train.model_config(args, dataset)


def test_a_row_without_distillation_token_needs_no_flag():
    assert config_of().distilled and not config_of("--no-distilled").distilled
    for name in TIMM:
        config = config_of("--backbone", name)
        assert not config.distilled and config.dim in (384, 768)
    assert config_of("--backbone", "clip-b16", "--encoder-hidden", "64").encoder_hidden == 64
    # Patch dropout may take what is no patch's: CLS and four registers
    dropout = ["--backbone", "dinov2-b14-reg4", "--patch-dropout", "0", "0.5", "--data-token"]
    assert config_of(*dropout, "4").data_token == 4
    with pytest.raises(UserError, match="leaves data token 5 out"):
        config_of(*dropout, "5")


def test_trained_resumed_evaluated_by_options(tiny_data, tmp_path, monkeypatch):
    row = {**BACKBONES["dinov2-s14-reg4"], "dim": D, "heads": HEADS, "depth": 1}
    monkeypatch.setitem(BACKBONES, "dinov2-s14-reg4", row)
    arguments = tiny_arguments(tiny_data, tmp_path / "run")
    at = arguments.index("--image-size")
    arguments[at : at + 3] = ["--image-size", 28, 56]
    more = ["--backbone", "dinov2-s14-reg4", "--epoch-steps", 1, 1, "--patch-dropout", 0, 0.5]
    done = call(train, *arguments, *more)
    assert done.returncode == 0, done.stderr
    again = call(train, *arguments, *more, "--resume")
    assert again.returncode == 0, again.stderr
    options = ["--attention", tmp_path / "attention.jpg", "--json", tmp_path / "metrics.json"]
    done = call(evaluate, tmp_path / "run/last.pt", *options, "--device", "cpu")
    assert done.returncode == 0 and (tmp_path / "attention.jpg").stat().st_size > 1000, done.stderr
    own = json.loads((tmp_path / "run/metrics.json").read_text())
    assert json.loads((tmp_path / "metrics.json").read_text())["mAP"] == own["mAP"]
    arguments[at : at + 3] = ["--image-size", 32, 64]
    arguments[arguments.index("--out") + 1] = tmp_path / "other"
    done = call(train, *arguments, *more)
    assert done.returncode == 2 and "nearest is 28x70" in done.stderr
    arguments[at : at + 3] = ["--image-size", 28, 56]
    arguments[arguments.index("--backbone-weights") + 1] = "deit"
    done = call(train, *arguments, *more)
    assert done.returncode == 2 and "not for --backbone dinov2-s14-reg4" in done.stderr
