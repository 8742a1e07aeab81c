"""Pretrain the synthetic set's backbone on RGB images of other vehicles: plain classification.

python -m synthetic.render --out data/pretrain --first-id 1001 --train-ids 1200 --test-ids 1 \
    --captures 4 --studio
python -m synthetic.pretrain --data-root data/pretrain --out weights/vit-small-rgb.pth

What DeiT's ImageNet weights are to the paper, these are to the synthetic set: a backbone that knows
colour images. `--backbone resnet18` makes HAMNet's.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
import runtime
from model import Backbone, ViT, load_backbone
from options import BACKBONES
from runtime import UserError, real, whole

IMAGE_SIZE = (64, 128)


def recolour(images: Tensor, draws: Tensor, share: float) -> Tensor:
    """Map the colours of a share of the images affinely at random; half of those to grey.

    images (B, 3, H, W), values 0 to 1; draws (B, 14), uniform in [0, 1). The mapped images still
    show the same vehicle, so colour alone does not tell who it is: shape and pattern must help, and
    they are what other sensors show, too.
    """
    matrix = (4 * draws[:, 2:11] - 2).unflatten(1, (3, 3))
    offset = 0.2 + 0.6 * draws[:, 11:14, None]
    grey = (draws[:, 1] < 0.5)[:, None, None]
    matrix = torch.where(grey, matrix[:, :1].expand_as(matrix), matrix)
    offset = torch.where(grey, offset[:, :1].expand_as(offset), offset)
    mapped = (matrix @ (images.flatten(2) - 0.5) + offset).clamp(0, 1).view_as(images)
    return torch.where((draws[:, 0] < share)[:, None, None, None], mapped, images)


def make_backbone(name: str) -> tuple[Backbone, int]:
    """A backbone, and the width of its tokens."""
    if name == "resnet18":
        from experiments.hamnet import ResNet  # here: the paper's backbone needs no HAMNet

        return ResNet(name), 512
    sizes = {key: value for key, value in BACKBONES[name].items() if key != "encoder_hidden"}
    return ViT(IMAGE_SIZE, **sizes), sizes["dim"]


def tokens_of(backbone: Backbone, images: Tensor, patch_dropout: float) -> Tensor:
    """What is classified, (B, N, D): all tokens of a ViT, or a ResNet's mean over places, N = 1."""
    if isinstance(backbone, ViT):
        return backbone(images, patch_dropout).float()
    return backbone(images).float().mean((2, 3))[:, None]


def make_heads(dim: int, num_ids: int, count: int) -> nn.ModuleList:
    """A head on the CLS and one on the distillation token, or one on a ResNet's only token.

    Without BatchNorm they stand still at first: a fresh ViT's tokens hardly depend on the image.
    """
    head = nn.Sequential(nn.BatchNorm1d(dim, affine=False), nn.Linear(dim, num_ids))
    return nn.ModuleList(copy.deepcopy(head) for _ in range(count))


def prepare(images: Tensor, share: float, normalise: data.Normalise) -> Tensor:
    """uint8 (B, 3, H, W) -> augmented, recoloured, normalised."""
    draws = torch.rand(len(images), 7).to(images.device)  # data.augment's without those of padding
    images = data.augment({"rgb": images}, draws, (0.5, 0.0), 0.25)["rgb"]
    images = recolour(images / 255, torch.rand(len(images), 14).to(images.device), share)
    return normalise({"rgb": images * 255})["rgb"]


def parse() -> argparse.Namespace:
    parser = runtime.Parser(__doc__, prog="python -m synthetic.pretrain")
    add = parser.add_argument
    add("--data-root", required=True, metavar="DIR", help="folder written by synthetic.render")
    add("--out", type=Path, required=True, metavar="FILE", help="file of fp16 weights to write")
    add("--backbone", choices=("small", "resnet18"), default="small")
    text = "what to continue from (default: random weights)"
    add("--weights", type=Path, metavar="FILE", help=text)
    add("--epochs", type=whole(1), default=25, metavar="N")
    add("--batch-size", type=whole(2), default=128, metavar="N", help="images")
    add("--lr", type=real(0), default=2e-3, metavar="LR")
    text = "share of images whose colours are mapped at random, reached half-way without --weights"
    add("--recolour", type=real(0, 1), default=0.5, metavar="P", help=text)
    text = "share of a ViT's patches that each image leaves out; a step takes as much less time"
    add("--patch-dropout", type=real(0, 1), default=0.0, metavar="P", help=text)
    add("--seed", type=whole(0), default=0, metavar="N", help="random seed")
    runtime.add_device_options(parser)
    args = parser.parse_args()
    if args.patch_dropout and args.backbone == "resnet18":
        raise UserError("--patch-dropout: a ResNet has no patches")
    runtime.check_output(args.out, "--out")
    return args


def train(args: argparse.Namespace, device: torch.device) -> Backbone:
    torch.manual_seed(args.seed)
    dataset = data.load_dataset("synthetic", args.data_root, ("rgb",), IMAGE_SIZE)
    images = torch.stack([images["rgb"] for images, _, _ in dataset.train])  # (N, 3, H, W)
    pids, labels = dataset.train.pids.unique(return_inverse=True)
    steps = len(images) // args.batch_size
    if not steps:
        raise UserError(f"--batch-size {args.batch_size}: there are only {len(images)} images")
    backbone, dim = make_backbone(args.backbone)
    if args.weights:
        load_backbone(backbone, args.weights)
    backbone = backbone.to(device, memory_format=torch.channels_last)
    heads = make_heads(dim, len(pids), 2 if isinstance(backbone, ViT) else 1).to(device)
    parameters = [*backbone.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.epochs * steps, pct_start=0.1
    )
    normalise = data.Normalise(dataset.mean, dataset.std, device)
    for epoch in range(args.epochs):
        total, right, began = 0.0, 0.0, time.perf_counter()
        order = torch.randperm(len(images))
        # Recolouring from the start stops all learning from random weights
        reached = 1.0 if args.weights else min(1.0, max(0.0, 4 * epoch / args.epochs - 1))
        for step in tqdm(range(steps), f"epoch {epoch + 1}", disable=None, leave=False):
            chosen = order[step * args.batch_size : (step + 1) * args.batch_size]
            batch = prepare(images[chosen].to(device), args.recolour * reached, normalise)
            with runtime.autocast(device, args.precision):
                tokens = tokens_of(backbone, batch, args.patch_dropout)
            logits = [head(tokens[:, i]) for i, head in enumerate(heads)]
            target = labels[chosen].to(device)
            losses = [F.cross_entropy(x, target, label_smoothing=0.1) for x in logits]
            loss = sum(losses) / len(losses)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.item()
            right += (sum(logits).argmax(1) == target).float().mean().item()
        means = f"loss {total / steps:.3f}, accuracy {right / steps:.3f}"
        seconds = time.perf_counter() - began
        print(f"epoch {epoch + 1} of {args.epochs}: {means} ({seconds:.1f} s)", flush=True)
    return backbone


@runtime.program
def main() -> None:
    args = parse()
    device = runtime.start(args.device)
    print("settings:", " ".join(f"{name}={value}" for name, value in vars(args).items()))
    state = train(args, device).state_dict()
    weights = {n: (w.half() if w.is_floating_point() else w).cpu() for n, w in state.items()}
    runtime.save_checkpoint(args.out, {"model": weights, "config": {"image_size": IMAGE_SIZE}})


if __name__ == "__main__":
    main()
