"""Least squares against plain references, for networks of every family."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import timm
import torch
from backbones import exact_archs, make_backbone
from torch import nn

from timm_mixpath import Arch, backbone_space, refit, warm_start
from timm_mixpath.utils.errors import UsageError

FAMILIES = [
    'mobilenetv2_050',
    'mobilenetv3_small_050',
    pytest.param('tf_efficientnet_lite0', marks=pytest.mark.slow),
    'mobilenetv4_conv_small_035',
    'lcnet_050',  # with an activation behind the projection
]


def images(count: int = 3, size: int = 64, seed: int = 0) -> list[tuple[torch.Tensor, None]]:
    generator = torch.Generator().manual_seed(seed)
    # Smooth, as photographs are: of white noise nothing can be told from anything else
    coarse = [torch.randn(24, 3, 4, 4, generator=generator, dtype=torch.double) for _ in range(count)]
    return [(nn.functional.interpolate(x, size=size, mode='bicubic'), None) for x in coarse]


def make_net(source: nn.Module, arch: str | Arch) -> nn.Module:
    name = source.pretrained_cfg['architecture']
    net = timm.create_model('mixpath', backbone=name, arch=str(arch), num_classes=10).double().eval()
    warm_start(net, source)
    return net


def smaller(name: str, every: int = 2) -> Arch:
    """The backbone's arch with every other block narrower or left out where it can be, or else with a small kernel."""
    space = backbone_space(name)
    blocks = list(space.default_arch.blocks)
    for index in range(1, len(blocks), every):
        spec = space.blocks[index]
        if spec.can_skip and index % 4 == 1:
            blocks[index] = type(blocks[index])((), 0)
        elif len(spec.expand_ratios) > 1:
            blocks[index] = replace(blocks[index], expand_ratio=min(spec.expand_ratios))
        else:  # of lcnet nothing but kernels can get smaller
            blocks[index] = replace(blocks[index], groups=((min(spec.kernel_sizes),),))
    return Arch.from_blocks(blocks)


def features(net: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    found, hooks = {}, []
    for i, stage in enumerate(net.blocks):
        for j, block in enumerate(stage):
            hooks.append(block.register_forward_hook(lambda *a, key=f'blocks.{i}.{j}': found.update({key: a[2]})))
    with torch.inference_mode():
        net(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize('name', FAMILIES)
def test_network_comes_nearer_to_its_backbone(name: str) -> None:
    source = make_backbone(name).double()
    batches = images()
    with torch.no_grad():  # statistics as they are for these images: those of `make_backbone` are any
        source.train()
        for module in source.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        source(batches[0][0])
        source.eval()
    net = make_net(source, smaller(name))
    x = batches[0][0]
    with torch.inference_mode():
        expected = source.forward_features(x)
        before = (net.forward_features(x) - expected).square().mean()
    missed = refit(net, source, batches)
    assert missed and all(0 <= after <= first for first, after in missed.values())
    assert sum(after for _, after in missed.values()) < 0.9 * sum(first for first, _ in missed.values())
    with torch.inference_mode():
        after = (net.forward_features(x) - expected).square().mean()
    assert after < 0.8 * before
    # What it reports is what there is on these images
    last = max(missed, key=lambda key: tuple(map(int, key.split('.')[1:])))
    ours, theirs = ([features(model, x)[last] for x, _ in batches] for model in (net, source))
    lacking = sum((a - b).square().sum() for a, b in zip(ours, theirs))
    together = torch.cat(theirs)
    varies = (together - together.mean((0, 2, 3), keepdim=True)).square().sum()
    assert missed[last][1] == pytest.approx((lacking / varies).item(), rel=1e-5)


def test_first_changed_block_is_the_solution_of_the_least_squares() -> None:
    source = make_backbone('mobilenetv2_050').double()
    space = backbone_space('mobilenetv2_050')
    blocks = list(space.default_arch.blocks)
    changed = next(i for i, spec in enumerate(space.blocks) if spec.can_skip)  # with a shortcut
    blocks[changed] = replace(blocks[changed], expand_ratio=min(space.blocks[changed].expand_ratios))
    # and the block behind it left out, which it learns, too
    behind = next(i for i in range(changed + 1, len(blocks)) if space.blocks[i].can_skip)
    assert behind == changed + 1 or not space.blocks[changed + 1].can_skip
    name = space.block_names[changed]
    net = make_net(source, Arch.from_blocks(blocks))
    block = copy.deepcopy(net.get_submodule(name))
    batches = images()
    inputs = [features(source, x) for x, _ in batches]
    previous = space.block_names[changed - 1]
    refit(net, source, batches, ridge=1e-9)

    # Inside the block the norms have the statistics of the images, averaged over batches
    for norm in (block.bn1, block.bn2):
        norm.momentum = None
        norm.reset_running_stats()
        norm.train()
    taken: list[torch.Tensor] = []
    hook = block.conv_pwl.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    with torch.no_grad():
        for found in inputs:
            block(found[previous])
        taken.clear()
        for norm in (block.bn1, block.bn2):
            norm.eval()
        for found in inputs:
            block(found[previous])
    hook.remove()
    rows = torch.cat([x.movedim(1, -1).flatten(0, -2) for x in taken])
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.double)], 1)
    wanted = torch.cat([(f[name] - f[previous]).movedim(1, -1).flatten(0, -2) for f in inputs])
    expected = rows @ torch.linalg.lstsq(rows, wanted).solution
    with torch.inference_mode():
        given = torch.cat([(net.get_submodule(name)(f[previous]) - f[previous]) for f in inputs])
    torch.testing.assert_close(given.movedim(1, -1).flatten(0, -2), expected, rtol=1e-5, atol=1e-6)
    # The norm behind it has the statistics that it sees, as a training would find them
    norm, conv = net.get_submodule(name).bn3, net.get_submodule(name).conv_pwl
    projected = rows[:, :-1] @ conv.weight.flatten(1).T
    torch.testing.assert_close(norm.running_mean, projected.mean(0), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(norm.running_var, projected.var(0, unbiased=False), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(conv.weight.flatten(1).norm(dim=1), block.conv_pwl.weight.flatten(1).norm(dim=1))


@pytest.mark.parametrize('name', [*FAMILIES, 'mixnet_s'])
def test_what_computes_the_same_is_left_as_it_is(name: str) -> None:
    source = make_backbone(name).double()
    for arch in (backbone_space(name).default_arch, exact_archs(backbone_space(name), 1)[0]):
        net = make_net(source, arch)
        before = copy.deepcopy(net.state_dict())
        assert refit(net, source, images(1)) == {}
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_projections_in_groups_keep_their_weights() -> None:
    source = make_backbone('mixnet_s').double()
    space = backbone_space('mixnet_s')
    blocks = list(space.default_arch.blocks)
    index = next(
        i
        for i, (name, block) in enumerate(zip(space.block_names, blocks))
        if i and not isinstance(source.get_submodule(name).conv_pwl, nn.Conv2d)
        if any(kernels != (3,) for kernels in block.groups)
    )
    blocks[index] = replace(blocks[index], groups=((3,),) * len(blocks[index].groups))
    net = make_net(source, Arch.from_blocks(blocks))
    name = space.block_names[index]
    before = copy.deepcopy(net.get_submodule(name).state_dict())
    missed = refit(net, source, images(2))
    assert missed and name not in missed
    after = net.get_submodule(name).state_dict()
    assert {key.split('.')[-1] for key, value in after.items() if not torch.equal(value, before[key])} == {
        'running_mean',
        'running_var',
        'num_batches_tracked',
    }


def test_modes_and_dtype_are_kept() -> None:
    source = make_backbone('mobilenetv3_small_050')
    net = make_net(source.double(), smaller('mobilenetv3_small_050')).float().train()
    net.bn1.eval()
    source = source.float()
    modes = [module.training for module in net.modules()]
    batches = [(x.float(), None) for x, _ in images(2)]
    assert refit(net, source, iter(batches))
    assert [module.training for module in net.modules()] == modes and not source.training
    assert all(v.dtype in (torch.float32, torch.int64) and v.isfinite().all() for v in net.state_dict().values())
    assert all(module.momentum is not None for module in net.modules() if isinstance(module, nn.BatchNorm2d))


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    source = make_backbone('mobilenetv2_050').double()
    net = make_net(source, smaller('mobilenetv2_050'))
    exact = make_net(source, exact_archs(backbone_space('mobilenetv2_050'), 1)[0])
    for model in source, net, exact:
        model.to(dtype)
    # More pixels than float16 can count
    batches = [(x.to(dtype), None) for x, _ in images(1, size=192)]
    assert batches[0][0][:, 0, ::2, ::2].numel() > torch.finfo(torch.float16).max
    missed = refit(net, source, batches)
    assert missed and all(0 <= after <= first < 100 for first, after in missed.values())
    assert sum(after for _, after in missed.values()) < 0.9 * sum(first for first, _ in missed.values())
    assert all(value.isfinite().all() for value in net.state_dict().values())
    # Rounding adds up from block to block, but does not make the first ones others
    assert not {'blocks.0.0', 'blocks.1.0', 'blocks.1.1'} & refit(exact, source, batches).keys()


def test_images_count_the_same_in_batches_of_any_size() -> None:
    source = make_backbone('mobilenetv2_050').double()
    x = torch.cat([batch for batch, _ in images(2)])[:33]
    arch = smaller('mobilenetv2_050')
    whole, uneven = make_net(source, arch), make_net(source, arch)
    first = refit(whole, source, [(x, None)])
    second = refit(uneven, source, [(x[:30], None), (x[30:], None)])
    assert first.keys() == second.keys()
    for name, shares in first.items():
        assert second[name] == pytest.approx(shares, rel=0.1), name


def test_wrong_values_change_nothing() -> None:
    source = make_backbone('mobilenetv3_small_050').double()
    net = make_net(source, smaller('mobilenetv3_small_050'))
    dilated = timm.create_model(
        'mixpath', backbone='mobilenetv3_small_050', arch=net.arch, num_classes=10, output_stride=8
    ).double()

    def interrupted() -> Iterator[tuple[torch.Tensor, None]]:
        yield from images(1)
        raise KeyboardInterrupt

    for model, other, batches, ridge, error, message in (
        (source, source, images(1), 0.3, UsageError, 'MobileNetV3 is no network around a backbone'),
        (net, make_backbone('mobilenetv3_small_075'), images(1), 0.3, UsageError, 'not those of mobilenetv3_small_050'),
        (net, source, [], 0.3, UsageError, 'there are no images'),
        (net, source, images(1), 0.0, UsageError, r'ridge=0\.0 must be a number above 0'),
        (net, source, images(1), float('nan'), UsageError, 'ridge=nan must be a number above 0'),
        (
            net,
            copy.deepcopy(source).float(),
            images(1),
            0.3,
            UsageError,
            r'the source is of torch\.float32, the model of',
        ),
        (net, source, [(images(1, 32)[0][0][:1], None)], 0.3, UsageError, r'a batch of 1 image\(s\) is too small'),
        (
            net,
            source,
            [(images(1)[0][0] * float('nan'), None)],
            0.3,
            UsageError,
            r'not finite at .* NaNs in the images',
        ),
        (net, source, [images(1)[0][0]], 0.3, UsageError, 'a batch is a pair of images and anything, .* not Tensor'),
        (net, source, images(1), 'a', UsageError, "ridge='a' must be a number above 0"),
        (net, source, interrupted(), 0.3, KeyboardInterrupt, None),
        (dilated, source, images(1), 0.3, UsageError, r'the two need the same options, such as output_stride'),
    ):
        before = copy.deepcopy(model.state_dict())
        momenta = [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        with pytest.raises(error, match=message):
            refit(model, other, batches, ridge=ridge)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert momenta == [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
