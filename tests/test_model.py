"""The model equals its references.

They are timm's ViT, torch's encoder layer, and a GraFT written out modality by modality.
"""

import pytest
import timm
import torch
from torch import nn

import model
from model import (
    FUSIONS,
    GraFTConfig,
    ModalityEncoder,
    MultiModalModel,
    ViT,
    build_model,
    load_backbone,
)
from options import BACKBONES, PAPER
from runtime import UserError

# HAMNet is a CNN, see test_hamnet.py; the weighted ones have other losses, see test_weighted.py
OURS = [fusion for fusion in FUSIONS if fusion not in ("hamnet", "weighted", "weighted-late")]
SIZE = (32, 64)
TINY = dict(
    image_size=SIZE, dim=32, depth=2, heads=2, encoder_heads=4, encoder_hidden=48, num_ids=5
)


def tiny(**changes) -> MultiModalModel:
    torch.manual_seed(0)
    return build_model(GraFTConfig(**{**TINY, **changes}))


def photos(batch=3, modalities=("rgb", "nir", "tir"), size=SIZE):
    generator = torch.Generator().manual_seed(1)
    return {modality: torch.randn(batch, 3, *size, generator=generator) for modality in modalities}


def timm_vit(distilled: bool, size=SIZE):
    deit = timm.models.deit.VisionTransformerDistilled
    kind = deit if distilled else timm.models.VisionTransformer
    torch.manual_seed(0)
    return kind(img_size=size, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=7)


torchs_encoder = nn.TransformerEncoderLayer.forward  # of an encoder's weights


# --- ViT and encoder


@pytest.mark.parametrize("distilled", [True, False])
def test_vit_equals_timm_in_value_and_gradient(distilled, tmp_path):
    theirs, ours = timm_vit(distilled), ViT(SIZE, 16, 32, 2, 2, distilled)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    left_out = load_backbone(ours, tmp_path / "timm.pth")
    assert set(left_out) == {n for n in theirs.state_dict() if n.startswith("head")}
    x = photos()["rgb"]
    a, b = ours(x), theirs.forward_features(x)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    a.square().sum().backward()
    b.square().sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-3, rtol=1e-4)


def test_patches_that_overlap_are_a_convolution_with_a_stride():
    patches = model.PatchEmbed(16, 8, stride=4)
    x = photos(size=(32, 48))["rgb"]
    expected = patches.proj(x).flatten(2).transpose(1, 2)
    assert expected.shape == (3, 5 * 9, 8)
    torch.testing.assert_close(patches(x), expected)
    assert ViT((32, 48), 16, 32, 2, 2, stride=4)(x).shape == (3, 2 + 5 * 9, 32)


def test_deit_base_equals_timm():
    theirs = timm.create_model("deit_base_distilled_patch16_224").eval()
    ours = ViT().eval()
    ours.load_state_dict(
        {name: w for name, w in theirs.state_dict().items() if not name.startswith("head")}
    )
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs.forward_features(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(3, 2, 34, 16), (2, 2, 130, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_and_without_gradients_is_the_same(shape, dtype):
    q, k, v = (
        torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)
    )
    expected = ((q.double() @ k.double().transpose(-2, -1)) / 4).softmax(-1) @ v.double()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for inputs in ((q, k, v), (q.requires_grad_(), k, v)):
        torch.testing.assert_close(model.attend(*inputs).double(), expected, atol=tolerance, rtol=0)


def test_encoder_equals_torch():
    encoder, x = ModalityEncoder(32, 4, 48).eval(), torch.randn(2, 9, 32)
    expected = torchs_encoder(encoder, x)
    torch.testing.assert_close(encoder(x), expected, atol=1e-5, rtol=0)
    some = encoder(x, (slice(0, 1), slice(4, 6)))
    torch.testing.assert_close(some, expected[:, [0, 4, 5]], atol=1e-5, rtol=0)
    ours, theirs = (
        torch.autograd.grad(y.square().sum(), [*encoder.parameters()])
        for y in (some, expected[:, [0, 4, 5]])
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_dropout_acts_in_training_only():
    encoder, x = ModalityEncoder(32, 4, 48, dropout=0.5), torch.randn(2, 9, 32)
    assert not torch.equal(encoder(x), encoder(x))
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))


# --- GraFT


@pytest.mark.parametrize("L, index", [(1, 0), (1, 5), (2, 3)])
def test_graft_is_the_papers_figure(L, index):
    """Fig. 3, Eq. (3) to (7), (11), (12), one modality at a time, with torch's encoder layer."""
    graft, images = tiny(fusion_tokens=L, data_token=index).eval(), photos()
    fusion, data = [], []
    for modality, image in images.items():
        tokens = torch.cat([graft.fusion_token.expand(3, -1, -1), graft.backbone(image)], 1)
        z = torchs_encoder(graft.encoders[modality], tokens)
        fusion.append(z[:, :L].flatten(1))
        data.append(z[:, L + index : 2 * L + index].flatten(1))
    out = graft(images)
    torch.testing.assert_close(out.fusion, sum(fusion) / 3, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.data, sum(data) / 3, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.fusion_of["tir"], fusion[2], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.data_of["nir"], data[1], atol=1e-5, rtol=0)
    assert out.fusion.shape == (3, L * 32)
    assert graft.classify(out.fusion).shape == (3, 5)


def test_a_subset_of_modalities_gives_the_mean_of_those_present():
    graft, images = tiny().eval(), photos()
    rgb, tir = (graft({name: images[name]}).fusion for name in ("rgb", "tir"))
    both = graft({name: images[name] for name in ("rgb", "tir")}).fusion
    torch.testing.assert_close(both, (rgb + tir) / 2, atol=1e-5, rtol=0)
    for wrong in ({"depth": images["rgb"]}, {}):
        with pytest.raises(ValueError, match="the model .*expected some of rgb,nir,tir"):
            graft.ordered(wrong)


@pytest.mark.parametrize("fusion", OURS)
def test_the_order_in_which_images_are_given_changes_nothing(fusion):
    built, images = tiny(fusion=fusion).eval(), photos()
    backwards = dict(reversed(images.items()))
    assert torch.equal(built(images).fusion, built(backwards).fusion)


def test_embeddings_are_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        out = tiny()(photos())
    assert out.fusion.dtype == torch.float32
    assert out.data.dtype == torch.float32


@pytest.mark.parametrize(
    "fusion, modalities, millions",
    [
        ("graft", ("rgb", "nir", "tir"), 102.34),
        ("graft", ("rgb", "nir"), 96.83),
        ("multistream", ("rgb", "nir", "tir"), 273.95),
        ("cls", ("rgb", "nir", "tir"), 91.32),
        ("early", ("rgb", "nir", "tir"), 92.50),
        ("late", ("rgb", "nir", "tir"), 85.80),
    ],
)
def test_papers_parameter_counts(fusion, modalities, millions):
    with torch.device("meta"):
        built = build_model(GraFTConfig(modalities, fusion=fusion))
    assert built.num_parameters() / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("fusion", OURS)
def test_every_fusion_trains_all_of_its_parameters_and_freezes_its_backbone(fusion):
    built, images = tiny(fusion=fusion), photos()
    out = built(images)
    assert out.fusion.shape == (3, 32)
    assert out.data.equal(out.fusion) == (fusion != "graft")
    loss = nn.functional.cross_entropy(built.classify(out.fusion), torch.arange(3))
    (loss + out.fusion[0].square().sum() + out.data[1, :7].square().sum()).backward()
    lacking = [name for name, p in built.named_parameters() if p.grad is None or not p.grad.any()]
    # A late fusion sees only the CLS tokens, so nothing is asked of them beyond the last block
    assert lacking == ["bottleneck.bias"]
    built.zero_grad()
    built.freeze_backbone(True)
    frozen = built(images).fusion
    assert built.training
    assert not any(vit.training for vit in built.backbones)
    if fusion != "late":  # which has nothing else
        frozen.square().sum().backward()
    assert all(p.grad is None for vit in built.backbones for p in vit.parameters())
    built.freeze_backbone(False)
    built(images).fusion.sum().backward()
    assert all(p.grad is not None for vit in built.backbones for p in vit.parameters())


@pytest.mark.parametrize("fusion", [fusion for fusion in OURS if fusion != "graft"])
def test_baselines_written_out(fusion):
    """Each baseline as its table describes it, with torch's own encoder layer."""
    built, images = tiny(fusion=fusion).eval(), photos()
    if fusion == "late":
        expected = sum(built.backbone(image)[:, 0] for image in images.values()) / 3
    elif fusion == "multistream":
        streams = [
            torchs_encoder(built.encoders[name], built.backbone[name](image))[:, 0]
            for name, image in images.items()
        ]
        expected = sum(streams) / 3
    elif fusion == "early":
        stacked = torch.cat(list(images.values()), 1)
        expected = torchs_encoder(built.encoder, built.backbone(stacked))[:, 0]
    else:
        tokens = torch.cat([built.backbone(image) for image in images.values()], 1)
        if fusion == "cls":
            tokens = torch.cat([built.cls_token.expand(3, -1, -1), tokens], 1)
        encoded = torchs_encoder(built.encoder, tokens)
        expected = encoded.mean(1) if fusion == "average" else encoded[:, 0]
    torch.testing.assert_close(built(images).fusion, expected, atol=1e-5, rtol=0)


def test_initialisation():
    graft = tiny(dim=64)
    bound = (6 / 65) ** 0.5  # Xavier
    assert bound / 2 < graft.fusion_token.abs().max().item() <= bound
    assert graft.classifier.weight.std().item() == pytest.approx(1e-3, rel=0.2)
    assert graft.classifier.bias is None
    assert not graft.bottleneck.bias.requires_grad
    assert not graft.bottleneck.bias.any()
    assert graft.bottleneck.weight.requires_grad


def test_bnneck_is_batchnorm():
    graft, x = tiny(), torch.randn(6, 32)
    reference = nn.BatchNorm1d(32)
    torch.testing.assert_close(graft.bottleneck(x), reference(x))
    torch.testing.assert_close(graft.bottleneck.running_var, reference.running_var)
    torch.testing.assert_close(graft.bottleneck.eval()(x), reference.eval()(x))
    with pytest.raises(UserError, match="batch of 1"):
        graft.bottleneck.train()(x[:1])


def test_patch_dropout_leaves_other_patches_of_each_image_out():
    torch.manual_seed(0)
    vit = ViT((64, 64), 16, 32, 0, 2)  # no blocks: a token is its own patch's alone
    images = torch.randn(6, 3, 64, 64)
    whole, some = vit(images), vit(images, 0.75)
    assert some.shape == (6, 2 + 4, 32)  # of 16 patches
    torch.testing.assert_close(some[:, :2], whole[:, :2])
    same = (some[:, 2:, None] - whole[:, None, 2:]).abs().amax(-1) < 1e-6  # (6, 4, 16)
    assert (same.sum(-1) == 1).all()
    assert (same.sum(1) <= 1).all()
    assert len({tuple(row.tolist()) for row in same.any(1)}) > 1
    assert vit(images, 1.0).shape == (6, 2 + 1, 32)


def test_patch_dropout_acts_in_training_only():
    network, images = tiny(dropout=0.0).eval(), photos()
    expected = network(images).fusion
    network.patch_dropout = 0.5
    assert torch.equal(network(images).fusion, expected)
    assert not torch.allclose(network.train()(images).fusion, expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(image_size=(30, 64)), "30x64: .* 16; .*--image-size 32 64"),
        (dict(image_size=(60, 64), stride=12), r"60x64: .* 16 \+ .* 12 .*--image-size 64 64"),
        (dict(stride=17), "--stride 17: expected at most the patch size, 16"),
        (dict(heads=3), "3 heads"),
        (dict(encoder_heads=5), "5 encoder heads"),
        (dict(data_token=10), "data token 10: expected 0 to 9"),
        (dict(fusion="sum"), "fusion 'sum'"),
    ],
)
def test_impossible_models_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        tiny(**changes)


# --- pretrained weights


def test_pretrained_weights_reach_every_backbone_of_a_baseline():
    """Early fusion of the same image three times sees what one image gives."""
    recipe = PAPER["synthetic"]
    size = dict(image_size=recipe["image_size"], **BACKBONES[recipe["backbone"]])
    models = [build_model(GraFTConfig(fusion=f, **size)) for f in ("graft", "multistream", "early")]
    for built in models:
        assert load_backbone(built, recipe["backbone_weights"]) == []
    graft, multistream, early = models
    image = photos(modalities=["rgb"], size=size["image_size"])["rgb"]
    expected = graft.backbone(image)
    for stream in multistream.backbones:
        assert torch.equal(stream(image), expected)
    stacked = early.backbone(image.repeat(1, 3, 1, 1))
    torch.testing.assert_close(stacked, expected, atol=1e-4, rtol=1e-4)


def test_released_deit_file_and_our_own_checkpoint(tmp_path):
    source = tiny()
    weights = source.backbone.state_dict()
    released = {"model": {**weights, "head.weight": torch.ones(7, 32)}}
    ours = {"model": source.state_dict(), "config": {"image_size": SIZE}}
    for content, left_out in ((released, ["head.weight"]), (ours, [])):
        torch.save(content, tmp_path / "file.pt")
        target = build_model(GraFTConfig(**TINY))
        assert load_backbone(target, tmp_path / "file.pt") == left_out
        torch.testing.assert_close(dict(target.backbone.state_dict()), dict(weights))
        assert not torch.equal(target.fusion_token, source.fusion_token)


def test_position_embeddings_are_resized(tmp_path):
    square = timm_vit(True, (64, 64))
    nn.init.normal_(square.pos_embed)
    torch.save(square.state_dict(), tmp_path / "square.pth")
    wide = ViT((32, 128), 16, 32, 2, 2)
    load_backbone(wide, tmp_path / "square.pth")
    expected = timm.layers.resample_abs_pos_embed(
        square.pos_embed,
        (2, 8),
        (4, 4),
        num_prefix_tokens=2,
        interpolation="bicubic",
        antialias=True,
    )
    torch.testing.assert_close(wide.pos_embed, expected, atol=1e-5, rtol=0)
    own = {"model": wide.state_dict(), "config": {"image_size": (32, 128)}}
    torch.save(own, tmp_path / "ours.pt")  # says that its grid is not a square
    back = ViT((64, 64), 16, 32, 2, 2)
    load_backbone(back, tmp_path / "ours.pt")
    expected = model.resize_pos_embed(wide.pos_embed, 2, (2, 8), (4, 4))
    torch.testing.assert_close(back.pos_embed, expected)
    finer = ViT((32, 128), 16, 32, 2, 2, stride=8)
    own = {"model": finer.state_dict(), "config": {"image_size": (32, 128), "stride": 8}}
    torch.save(own, tmp_path / "finer.pt")
    load_backbone(back, tmp_path / "finer.pt")
    expected = model.resize_pos_embed(finer.pos_embed, 2, (3, 15), (4, 4))
    torch.testing.assert_close(back.pos_embed, expected)


def test_weights_that_do_not_fit_are_named(tmp_path):
    target = ViT(SIZE, 16, 32, 2, 2)

    def load(state):
        torch.save(state, tmp_path / "file.pth")
        load_backbone(target, tmp_path / "file.pth")

    for image_size in ((24, 24), (20, 20), None):  # a run's whose patches are of 8 pixels
        file = {"model": ViT((24, 24), 8, 32, 2, 2).state_dict(), "config": {"stride": 0}}
        file["config"]["image_size"] = image_size
        with pytest.raises(UserError, match="file.pth: not the weights of this backbone"):
            load(file)
    with pytest.raises(UserError, match='Missing key.*"dist_token".*timm:NAME'):
        load(ViT(SIZE, 16, 32, 2, 2, distilled=False).state_dict())
    with pytest.raises(UserError, match=r"torch.Size\(\[1, 1, 48\]\)"):
        load(ViT(SIZE, 16, 48, 2, 2).state_dict())
    with pytest.raises(UserError, match=r"Unexpected key.*blocks\.2"):
        load(ViT(SIZE, 16, 32, 3, 2).state_dict())
    with pytest.raises(UserError, match="no state dict"):
        load({"epoch": 3})
    with pytest.raises(UserError, match="no such file"):
        load_backbone(target, tmp_path / "absent.pth")


def test_deit_without_network_says_which_file_to_put_where(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"distilled_patch16_224-df68dfff\.pth.*put it at"):
        load_backbone(ViT(SIZE), "pretrained")
    with pytest.raises(UserError, match="only DeiT-B's weights are released"):
        load_backbone(ViT(SIZE, 16, 32, 2, 2), "pretrained")


def test_a_download_whose_hash_is_not_that_in_its_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    torch.save({}, tmp_path / "other-df68dfff.pth")
    with pytest.raises(UserError, match="invalid hash value.*put it at"):
        model.fetch((tmp_path / "other-df68dfff.pth").as_uri())
    assert not list((tmp_path / "home").rglob("*.pth"))


def test_configs_of_older_checkpoints():
    old = dict(TINY, norm_eps=1e-6, registers=0, test_token="data", bnneck_features=True)
    assert model.stored_config(old) == GraFTConfig(**TINY)
    with pytest.raises(UserError, match="registers: .*timm:NAME"):
        model.stored_config({**old, "registers": 4})
    with pytest.raises(UserError, match="dim '32': expected a int"):
        model.stored_config({**TINY, "dim": "32"})
