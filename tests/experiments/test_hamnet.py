"""HAMNet written out from its formulas in plain loops; its weights, its ranks, its recipe."""

from dataclasses import replace

import pytest
import torch
import torchvision
from conftest import fails, read_log, succeeds, tiny_arguments
from torch import nn

import options
import runtime
import train
from experiments import hamnet
from experiments.hamnet import HAMNet
from losses import GraFTLoss
from model import GraFTConfig, build_model, load_backbone
from runtime import UserError

C, SIZE, NAMES = 5, (32, 64), ("rgb", "nir", "tir")


def config(backbone: str = "resnet18") -> GraFTConfig:
    return GraFTConfig(NAMES, C, SIZE, fusion="hamnet", backbone=backbone)


@pytest.fixture(scope="module")
def net() -> HAMNet:
    torch.manual_seed(0)
    return build_model(config())


def photos(batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {modality: torch.randn(batch, 3, *SIZE, generator=generator) for modality in NAMES}


def random_parts(batch: int, modalities: int) -> tuple[dict, dict]:
    """Features (B, D) and activation maps (B, C, h, w) of the first modalities."""
    generator, names = torch.Generator().manual_seed(2), NAMES[:modalities]
    features = {name: torch.randn(batch, 512, generator=generator) for name in names}
    return features, {name: torch.rand(batch, C, 2, 4, generator=generator) for name in names}


def written_out(features: dict, activations: dict, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The fused feature (D,) and the fused scores (C,) of sample b, class by class."""
    feature, scores = torch.zeros(512), torch.zeros(C)
    strongest = torch.stack([A[b] for A in activations.values()]).max(0).values
    for c in range(C):
        r = strongest[c].sum() / strongest.sum()
        S = {modality: A[b, c].sum() for modality, A in activations.items()}
        for modality, S_m in S.items():
            w = S_m / sum(S.values())
            feature += r * w * features[modality][b]
            scores[c] += r * w * S_m
    return feature, scores


@pytest.mark.parametrize("modalities", [1, 2, 3])
def test_fusion_written_out(modalities):
    parts = random_parts(2, modalities)
    embeddings = hamnet.fuse(*parts)
    for b in range(2):
        feature, scores = written_out(*parts, b)
        torch.testing.assert_close(embeddings.fusion[b], feature)
        torch.testing.assert_close(embeddings.scores[b], scores)


def test_losses_written_out(net):
    embeddings = hamnet.fuse(*random_parts(6, 3))
    features, fused = [*embeddings.fusion_of.values()], embeddings.scores
    labels = torch.tensor([0, 0, 0, 3, 3, 3])
    criterion = GraFTLoss(C, 512, "hardest", squared=False)
    criterion.set_weights(alpha=1.0, beta=0.0, gamma=1.0, label_smoothing=0.0)
    criterion.margin = 0.3
    nn.init.normal_(net.classifier.weight, std=0.1)
    found = net.losses(embeddings, labels, criterion)
    logits = [f @ net.classifier.weight.T + net.classifier.bias for f in features]
    triplet = entropy = 0.0
    for x, classes in [*zip(features, logits, strict=True), (fused, fused)]:
        entropy += -classes.log_softmax(1)[range(6), labels].mean()
        for i in range(6):
            d = [(x[i] - x[j]).norm() for j in range(6)]
            farthest = max(d[j] for j in range(6) if labels[j] == labels[i])
            nearest = min(d[j] for j in range(6) if labels[j] != labels[i])
            triplet += max(0.0, farthest - nearest + 0.3) / 6
    a, b, c = (classes / classes.norm(dim=1, keepdim=True) for classes in logits)
    coherence = 6 - (a * b * c).sum()
    torch.testing.assert_close(found["triplet"], triplet)
    torch.testing.assert_close(found["cross_entropy"], entropy)
    torch.testing.assert_close(found["coherence"], coherence)
    torch.testing.assert_close(found["loss"], triplet + entropy + 0.001 * coherence)
    assert hamnet.incoherence(logits[:1]) == 0


def test_parts_are_the_published_ones(net):
    """Mean over places, then BatchNorm; a 1x1 convolution, then a sigmoid; some sensors at test."""
    net.eval()
    images, features, activations = photos(), {}, {}
    with torch.no_grad():
        for modality in ("rgb", "tir"):
            x = net.backbone[modality](images[modality])
            assert x.shape == (2, 512, 2, 4)  # a stride of 16
            norm, to_map = net.norms[modality], net.maps[modality].weight[:, :, 0, 0]
            f = (x.mean((2, 3)) - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
            features[modality] = f * norm.weight
            activations[modality] = torch.einsum("cd,bdyx->bcyx", to_map, x).sigmoid()
        some = net({name: images[name] for name in ("tir", "rgb")})
    assert list(some.fusion_of) == ["rgb", "tir"]
    torch.testing.assert_close(some.fusion_of, features)
    for b in range(2):
        feature, scores = written_out(features, activations, b)
        torch.testing.assert_close(some.fusion[b], feature)
        torch.testing.assert_close(some.scores[b], scores)


def test_every_parameter_trains_but_of_a_frozen_backbone(net):
    net.train()
    criterion, labels = GraFTLoss(C, 512, "hardest"), torch.tensor([0, 0, 1, 1])
    net.losses(net(photos(4)), labels, criterion)["loss"].backward()
    lacking = [name for name, p in net.named_parameters() if p.grad is None]
    assert lacking == [f"norms.{modality}.bias" for modality in NAMES]
    net.freeze_backbone(True)
    before = {name: buffer.clone() for name, buffer in net.backbone.named_buffers()}
    assert not any(net.backbone[name](image).requires_grad for name, image in photos(4).items())
    assert all(torch.equal(buffer, before[n]) for n, buffer in net.backbone.named_buffers())
    net.freeze_backbone(False)


def test_parameter_counts():
    """The paper: 78 M, 26 M a modality: a ResNet-50 whose 1,000 classes (2 M) count."""
    with torch.device("meta"):
        built = build_model(replace(config("resnet50"), num_ids=50))
    assert built.num_parameters() / 1e6 == pytest.approx(70.84, abs=0.01)
    prunable = sum(p.weight.numel() for part in built.backbones for p in part.prunable())
    # Not the ResNets' BatchNorms, nor the activation maps and BatchNorms of the fusion
    assert prunable == built.num_parameters() - (53_120 + 2048 * (50 + 2)) * 3


# --- pretrained weights


def test_torchvisions_weights_reach_every_modality_strictly(net, tmp_path):
    theirs = torchvision.models.resnet18()
    path, state = tmp_path / "resnet18.pth", theirs.state_dict()
    old = {name: w for name, w in state.items() if "num_batches" not in name}
    for file in (state, old):
        torch.save(file, path)
        assert load_backbone(net, path) == ["fc.weight", "fc.bias"]
    for resnet in net.backbones:
        for name, weight in resnet.state_dict().items():
            assert torch.equal(weight, state[name]) or "num_batches" in name
    x = photos()["rgb"]
    theirs.layer4[0].conv1.stride = theirs.layer4[0].downsample[0].stride = (1, 1)
    expected = theirs.eval().avgpool(net.backbone["rgb"].eval()(x)).flatten(1)
    torch.testing.assert_close(theirs.fc(expected), theirs(x))
    del old["bn1.weight"]
    torch.save(old, path)
    with pytest.raises(UserError, match=r"bn1\.weight"):
        load_backbone(net, path)


def test_imagenets_weights_are_those_of_its_days(net, monkeypatch):
    urls = []
    monkeypatch.setattr(hamnet, "fetch", lambda url: urls.append(url) or "nowhere.pth")
    with pytest.raises(UserError, match="nowhere.pth: no such file"):
        load_backbone(net, "pretrained")
    assert urls == ["https://download.pytorch.org/models/resnet18-f37072fd.pth"]


# --- ranks


def test_a_step_of_two_ranks_is_that_of_one(tiny_data, tmp_path, monkeypatch):
    """Losses, gradients, and BatchNorm's statistics of all samples and places."""
    layout = {"resnet18": (torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])}  # for speed
    monkeypatch.setattr(hamnet, "LAYOUTS", layout)
    one_step = "--epochs 0 1 --epoch-steps 0 1 --schedule constant --lr 1e-5 --batch-size 4"
    models = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        tiny = [*tiny_arguments(tiny_data, out), "--fusion", "hamnet"]
        succeeds(train, *tiny, *one_step.split(), ranks=ranks)
        models.append(runtime.load_checkpoint(out)["model"])
    (a,), (b,) = (read_log(tmp_path / ranks, "step") for ranks in "12")
    for name in ("loss", "triplet", "cross_entropy", "coherence", "gradient_norm"):
        assert b[name] == pytest.approx(a[name], rel=1e-3), name
    for name, statistic in models[0].items():
        if "running" in name:
            torch.testing.assert_close(models[1][name], statistic, atol=1e-4, rtol=1e-3)


# --- its recipe


def test_its_defaults_are_its_own_and_explicit_options_win():
    args = options.parse(["--fusion", "hamnet", "--dataset", "rgbnt100"])
    assert (args.backbone, args.backbone_weights) == ("resnet50", "pretrained")
    assert (args.samples, args.batch_size, args.margin, args.pad) == (4, 12, 0.3, 10)
    assert [stage.epochs for stage in args.stages] == [0, 40]
    steps = (0, 1000, 3999, 4000, 7000)
    factors = [train.schedule_factor(args.stages[1], step, 12_000) for step in steps]
    # a twelfth to warm up, where 2,400 steps are more
    assert factors == pytest.approx([1 / 1000, 1, 1, 0.1, 0.01])
    given = ["--fusion", "hamnet", "--lr", "1", "2", "--batch-size", "16"]
    args = options.parse(given)
    assert (args.stages[1].lr, args.batch_size, args.backbone, args.pad) == (2, 16, "resnet18", 0)


def test_what_does_not_go_with_it_is_one_line(tiny_data, tmp_path):
    tiny = [*tiny_arguments(tiny_data, tmp_path / "out"), "--fusion", "hamnet"]
    assert "makes 39 images" in fails(train, *tiny, "--batch-size", 13)
    assert "--fusion hamnet takes resnet18 or resnet50" in fails(
        train, *tiny, "--backbone", "deit-b"
    )
    assert not (tmp_path / "out").exists()
