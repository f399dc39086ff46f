"""Backbones with statistics as after a training, supernets around them, and archs that compute what they do."""

import random

import timm
import torch
from torch import nn

from timm_mixpath import Arch, BackboneSpace, BlockChoice, warm_start
from timm_mixpath.models.backbone import BackboneSupernet


def make_backbone(name: str, seed: int = 0, **kwargs) -> nn.Module:
    """A backbone whose batch norms have statistics and weights as after a training, in eval mode."""
    torch.manual_seed(seed)
    network = timm.create_model(name, **{'num_classes': 10, **kwargs})
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def make_supernet(network: nn.Module, **kwargs) -> BackboneSupernet:
    name = network.pretrained_cfg['architecture']
    kwargs = {'num_classes': network.num_classes, 'in_chans': network.in_chans, **kwargs}
    supernet = timm.create_model('mixpath_supernet', backbone=name, **kwargs).to(network.conv_stem.weight.dtype)
    warm_start(supernet, network)
    return supernet.eval()


def exact_archs(space: BackboneSpace, count: int) -> list[Arch]:
    """Archs of the backbone's expansions whose kernels are at least as large as its own, and sums of them."""
    draw = random.Random(0)
    archs = []
    for _ in range(count):
        blocks = []
        for spec, own in zip(space.blocks, space.default_arch.blocks):
            groups = []
            for (kernel_size,) in own.groups:
                larger = [k for k in spec.kernel_sizes if k >= kernel_size]
                num_paths = draw.randint(1, min(len(larger), space.max_paths))
                groups.append(tuple(sorted(draw.sample(larger, num_paths))))
            blocks.append(BlockChoice(tuple(groups), own.expand_ratio))
        archs.append(Arch.from_blocks(blocks))
    return archs
