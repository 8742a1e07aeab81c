"""HAMNet written out from its formulas in plain loops; its weights, its ranks, its refusals."""

import json

import pytest
import torch
import torchvision
from conftest import call, tiny_arguments
from torch import nn

import baselines
import prune
import runtime
import train
from baselines import HAMNet, Stream, class_shares
from losses import GraFTLoss, triplet_hardest
from model import GraFTConfig, SyncBatchNorm2d, ViT, build_model, load_backbone
from runtime import UserError

C, SIZE = 5, (32, 64)
HAMNET = ["--fusion", "hamnet", "--samples", 6, "--epochs", 0, 2, "--epoch-steps", 0, 1]


@pytest.fixture(scope="module")
def hamnet() -> HAMNet:
    torch.manual_seed(0)
    return build_model(GraFTConfig(image_size=SIZE, num_ids=C, fusion="hamnet", resnet=18))


def photos(batch=2, modalities=("rgb", "nir", "tir")):
    generator = torch.Generator().manual_seed(1)
    return {modality: torch.randn(batch, 3, *SIZE, generator=generator) for modality in modalities}


def random_streams(batch: int, modalities: int) -> list[Stream]:
    generator = torch.Generator().manual_seed(2)
    return [
        Stream(
            torch.randn(batch, 512, generator=generator),
            torch.rand(batch, C, 2, 4, generator=generator),
        )
        for _ in range(modalities)
    ]


def written_out(streams: list[Stream], b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The fused feature (D,) and the fused scores (C,) of sample b, class by class."""
    places = [(y, x) for y in range(2) for x in range(4)]
    total = [
        sum(max(s.activation[b, c, y, x] for s in streams) for y, x in places) for c in range(C)
    ]
    feature, scores = torch.zeros(512), torch.zeros(C)
    for stream in streams:
        for c in range(C):
            r = total[c] / sum(total)
            S = [sum(s.activation[b, c, y, x] for y, x in places) for s in streams]
            S_m = sum(stream.activation[b, c, y, x] for y, x in places)
            w = S_m / sum(S)
            feature += r * w * stream.features[b]
            scores[c] += r * w * S_m
    return feature, scores


@pytest.mark.parametrize("modalities", [1, 2, 3])
def test_fusion_written_out(hamnet, monkeypatch, modalities):
    streams = random_streams(2, modalities)
    shares, scores = class_shares(streams)
    torch.testing.assert_close(shares.sum((1, 2)), torch.ones(2))
    monkeypatch.setattr(hamnet, "streams", lambda images: streams)
    fused = hamnet(photos(modalities=("rgb", "nir", "tir")[:modalities])).fusion
    for b in range(2):
        feature, classes = written_out(streams, b)
        torch.testing.assert_close(fused[b], feature)
        torch.testing.assert_close((shares * scores).sum(1)[b], classes)


def test_losses_written_out(hamnet):
    streams, labels = random_streams(6, 3), torch.tensor([0, 0, 0, 3, 3, 3])
    criterion = GraFTLoss(C, 512, "hardest", squared=False)
    criterion.weights(alpha=1.0, beta=0.0, gamma=1.0, label_smoothing=0.0)
    criterion.margin = 0.3
    nn.init.normal_(hamnet.classifier.weight, std=0.1)
    found = hamnet.losses(streams, criterion, labels, ())
    logits = [s.features @ hamnet.classifier.weight.T + hamnet.classifier.bias for s in streams]
    fused = torch.stack([written_out(streams, b)[1] for b in range(6)])
    triplet = entropy = 0.0
    for x, classes in [*zip([s.features for s in streams], logits, strict=True), (fused, fused)]:
        entropy += -classes.log_softmax(1)[range(6), labels].mean()
        for i in range(6):
            d = [(x[i] - x[j]).norm() for j in range(6)]
            farthest = max(d[j] for j in range(6) if labels[j] == labels[i])
            nearest = min(d[j] for j in range(6) if labels[j] != labels[i])
            triplet += max(0.0, farthest - nearest + 0.3) / 6
    coherence = 6 - sum(
        (logits[0][b] / logits[0][b].norm())
        @ (logits[1][b] / logits[1][b].norm() * logits[2][b] / logits[2][b].norm())
        for b in range(6)
    )
    torch.testing.assert_close(found["triplet"], triplet)
    torch.testing.assert_close(found["cross_entropy"], entropy)
    torch.testing.assert_close(found["coherence"], coherence)
    torch.testing.assert_close(found["loss"], triplet + entropy + 0.001 * coherence)
    assert hamnet.losses(streams[:1], criterion, labels, ())["coherence"] == 0


def test_hard_margin_by_hand():
    features, labels = torch.tensor([[0.0], [1.0], [1.2], [4.0]]), torch.tensor([0, 0, 1, 1])
    # d(a, p) - d(a, n) + 0.3: 1 - 1.2, 1 - 0.2, 2.8 - 0.2, 2.8 - 3 and 0.3 each
    loss = triplet_hardest(features, labels, squared=False, margin=0.3)
    assert loss.item() == pytest.approx((0.1 + 1.1 + 2.9 + 0.1) / 4)


def test_streams_are_the_published_parts(hamnet):
    """Mean over places, then BatchNorm; a 1x1 convolution, then a sigmoid; some sensors at test."""
    hamnet.eval()
    with torch.no_grad():
        streams = hamnet.streams(images := photos())
        for (modality, image), stream in zip(images.items(), streams, strict=True):
            x = hamnet.backbone[modality](image)
            assert x.shape == (2, 512, 2, 4)  # a stride of 16
            norm, to_map = hamnet.norms[modality], hamnet.maps[modality]
            f = (x.mean((2, 3)) - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
            torch.testing.assert_close(stream.features, f * norm.weight)
            classes = torch.einsum("cd,bdyx->bcyx", to_map.weight[:, :, 0, 0], x)
            torch.testing.assert_close(stream.activation, classes.sigmoid())
        some = {name: images[name] for name in ("rgb", "tir")}
        torch.testing.assert_close(
            hamnet(some).fusion[0], written_out([streams[0], streams[2]], 0)[0]
        )


def test_every_parameter_trains_and_the_backbone_freezes(hamnet):
    hamnet.train()
    criterion = GraFTLoss(C, 512, "hardest")
    labels = torch.tensor([0, 0, 1, 1])
    hamnet.losses(hamnet.streams(photos(4)), criterion, labels, ())["loss"].backward()
    lacking = [name for name, p in hamnet.named_parameters() if p.grad is None]
    assert lacking == [f"norms.{modality}.bias" for modality in photos()]
    hamnet.zero_grad()
    hamnet.freeze_backbone(True)
    before = {name: buffer.clone() for name, buffer in hamnet.backbone.named_buffers()}
    hamnet.losses(hamnet.streams(photos(4)), criterion, labels, ())["loss"].backward()
    assert all(p.grad is None for p in hamnet.backbone.parameters())
    assert all(torch.equal(buffer, before[n]) for n, buffer in hamnet.backbone.named_buffers())
    hamnet.freeze_backbone(False)


@pytest.mark.parametrize(
    "modalities, millions", [(("rgb", "nir", "tir"), 70.84), (("rgb", "nir"), 47.23)]
)
def test_parameter_counts(modalities, millions):
    """The paper: 78 and 52 M, 26 M a modality: a ResNet-50 whose 1,000 classes (2 M) count."""
    with torch.device("meta"):
        built = build_model(GraFTConfig(modalities, fusion="hamnet", resnet=50))
    assert built.num_parameters() / 1e6 == pytest.approx(millions, abs=0.01)
    assert (built.num_parameters() / 1e6 + 2 * len(modalities)) == pytest.approx(
        26 * len(modalities), rel=0.03
    )
    others = 2048 * (50 + 2) * len(modalities)  # activation maps and BatchNorms of the fusion
    convolutions = prune.prunable(built)  # all but the ResNets' own BatchNorms, 53,120 each
    assert convolutions == built.num_parameters() - others - 53_120 * len(modalities)


# --- pretrained weights


def test_torchvisions_weights_reach_every_modality(hamnet, tmp_path):
    """Strictly, but for the classifier, and for the counters that old files lack."""
    theirs = torchvision.models.resnet18()
    path, state = tmp_path / "resnet18.pth", theirs.state_dict()
    old = {name: w for name, w in state.items() if "num_batches" not in name}
    for file in (state, old):
        torch.save(file, path)
        assert load_backbone(hamnet, path) == ["fc.weight", "fc.bias"]
    for resnet in hamnet.backbones:
        for name, weight in resnet.state_dict().items():
            assert torch.equal(weight, state[name]) or "num_batches" in name
    x = photos()["rgb"]
    theirs.layer4[0].conv1.stride = theirs.layer4[0].downsample[0].stride = (1, 1)
    expected = theirs.eval().avgpool(hamnet.backbone["rgb"].eval()(x)).flatten(1)
    torch.testing.assert_close(theirs.fc(expected), theirs(x))
    del old["bn1.weight"]
    torch.save(old, path)
    with pytest.raises(UserError, match=r"lacks bn1\.weight, has also nothing"):
        load_backbone(hamnet, path)
    torch.save(torchvision.models.resnet50().state_dict(), path)
    for model in (hamnet, ViT(SIZE, 16, 32, 1, 2)):
        with pytest.raises(UserError, match="it fits --fusion hamnet --backbone resnet50"):
            load_backbone(model, path)


def test_imagenets_file_is_named_where_it_cannot_be_fetched(hamnet, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"resnet18-f37072fd\.pth.*put it at"):
        load_backbone(hamnet, "imagenet")


# --- ranks


class Normalising:
    """A program for `call`: unequal parts of a batch through SyncBatchNorm2d, forward and back."""

    __name__ = "step"

    def __init__(self, folder):
        self.folder = folder

    def main(self) -> None:
        runtime.start("cpu")
        rank = runtime.rank()
        torch.save(normalised(SyncBatchNorm2d(4), parts()[rank]), self.folder / f"{rank}.pt")
        runtime.leave_ranks()


def parts() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, 4, 2, 3), torch.randn(3, 4, 2, 3)]


def normalised(norm: nn.Module, x: torch.Tensor) -> tuple:
    x.requires_grad_(True)
    y = norm(x)
    y.pow(3).sum().backward()
    return y.detach(), x.grad, norm.running_mean, norm.running_var


def test_batchnorm_over_ranks_is_that_of_the_whole(tmp_path):
    done = call(Normalising(tmp_path), ranks=2)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    y, gradient, mean, variance = normalised(nn.BatchNorm2d(4), torch.cat(parts()).detach())
    torch.testing.assert_close(torch.cat([first[0], second[0]]), y)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), gradient, atol=1e-4, rtol=1e-4)
    for result in (first, second):
        torch.testing.assert_close(result[2], mean)
        torch.testing.assert_close(result[3], variance)


def log(folder, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def test_two_ranks_train_as_one_and_a_resumed_run_as_one_that_was_not(
    tiny_data, tmp_path, monkeypatch
):
    layout = {18: (baselines.resnet.BasicBlock, [1, 1, 1, 1])}  # for speed; forked programs see it
    monkeypatch.setattr(baselines, "LAYOUTS", layout)

    def trained(name: str, *more, ranks: int = 1) -> dict:
        options = [*tiny_arguments(tiny_data, tmp_path / name), *HAMNET, "--log-every", 1]
        # A rate at which Adam's first step, of a sign's size, does not blow rounding errors up
        options += ["--schedule", "constant", "constant", "--lr", 1e-5, 1e-5]
        done = call(train, *options, *more, ranks=ranks)
        assert done.returncode == 0, done.stderr
        return runtime.load_checkpoint(tmp_path / name / "last.pt")["model"]

    one, two = trained("one"), trained("two", ranks=2)
    for a, b in zip(*(log(tmp_path / name, "step") for name in ("one", "two")), strict=True):
        for name in ("loss", "triplet", "cross_entropy", "coherence"):
            assert b[name] == pytest.approx(a[name], rel=1e-3), (name, a, b)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=0.02)
    for name in ("backbone.tir.bn1.running_mean", "backbone.rgb.layer4.0.bn2.running_var"):
        torch.testing.assert_close(two[name], one[name], atol=1e-2, rtol=1e-2)
    trained("resumed", "--epochs", 0, 1)
    resumed = trained("resumed", "--resume")
    assert all(torch.equal(weight, resumed[name]) for name, weight in one.items())


# --- command line


@pytest.mark.parametrize(
    "options, message",
    [
        (["--backbone", "deit-b"], "--fusion hamnet: takes no ViT; expected --backbone resnet50"),
        (["--backbone-weights", "deit"], "--backbone-weights deit: not for --backbone resnet18"),
        (["--recipe", "plus"], "--recipe plus: --fusion hamnet has a recipe of its own"),
        (["--beta", 0, 0.1], "--beta: --fusion hamnet has no center loss; expected 0 0"),
        (["--patch-dropout", 0, 0.5], "--patch-dropout: --fusion hamnet has no patches"),
        (["--checkpointing"], "--checkpointing: --fusion hamnet has BatchNorms"),
        (["--modality-losses", 1], "--fusion hamnet has no tokens of a modality"),
        (["--fusion-tokens", 2], "--fusion-tokens: for --fusion graft; --fusion hamnet has none"),
        (["--data-token", 5], "--data-token: for --fusion graft; --fusion hamnet has none"),
        (["--bnneck-features"], "--fusion hamnet has no BNNeck"),
        (["--test-token", "data"], "--fusion hamnet has no data token"),
        (["--samples", 5], "makes 24 images, 5 of each of 4.8 identities"),
        (["--fusion", "graft"], "--backbone resnet18: for --fusion hamnet; --fusion graft takes"),
    ],
)
def test_what_does_not_go_together_is_one_line(tiny_data, tmp_path, options, message):
    given = [*tiny_arguments(tiny_data, tmp_path / "out"), *HAMNET, "--backbone", "resnet18"]
    done = call(train, *given, *options)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_its_defaults_are_its_own_and_explicit_options_win():
    args = train.parse(["--fusion", "hamnet", "--dataset", "rgbnt100"])
    assert (args.backbone, args.backbone_weights) == ("resnet50", "imagenet")
    assert (args.samples, args.batch_size, args.margin) == (4, 12, 0.3)
    assert [stage.epochs for stage in args.stages] == [0, 40]
    factors = [
        train.schedule_factor(args, args.stages[1], step, 12_000) for step in (0, 1000, 3999)
    ]
    assert factors == pytest.approx([1 / 1000, 1, 1])  # a twelfth, where 2,400 steps are more
    factors = [train.schedule_factor(args, args.stages[1], step, 12_000) for step in (4000, 7000)]
    assert factors == pytest.approx([0.1, 0.01])
    args = train.parse(["--fusion", "hamnet", "--lr", "1", "2", "--batch-size", "16"])
    assert (args.stages[1].lr, args.batch_size, args.backbone) == (2, 16, "resnet18")
    assert train.parse([]).samples == 6 and train.parse([]).margin is None
    with pytest.raises(UserError, match="resnet 34: expected resnet50 or resnet18"):
        GraFTConfig(fusion="hamnet", resnet=34)
