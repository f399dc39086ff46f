"""Slow plain reference of MixPath's networks, written from the description of the paper and its released code.

One function a part, functional ops on a dict of tensors, one `if` per choice: nothing is shared with the package but
the names of the parameters. Batch norm is written out, so that its statistics are checked too.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_mixpath import Arch, SearchSpace

Tensors = dict[str, torch.Tensor]


def batch_norm(tensors: Tensors, name: str, x: torch.Tensor, training: bool) -> torch.Tensor:
    """Batch norm `name` of x [B, C, H, W]; in training the running statistics in `tensors` move by 0.1."""
    mean, var = tensors[f'{name}.running_mean'], tensors[f'{name}.running_var']
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            tensors[f'{name}.running_mean'] = 0.9 * tensors[f'{name}.running_mean'] + 0.1 * mean
            tensors[f'{name}.running_var'] = 0.9 * tensors[f'{name}.running_var'] + 0.1 * var * count / (count - 1)
            tensors[f'{name}.num_batches_tracked'] = tensors[f'{name}.num_batches_tracked'] + 1
    x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    return x * tensors[f'{name}.weight'][:, None, None] + tensors[f'{name}.bias'][:, None, None]


def choice_block(
    tensors: Tensors,
    name: str,
    x: torch.Tensor,
    *,
    groups: Sequence[Sequence[int]],
    expand_ratio: int,
    stride: int,
    training: bool,
    sbn: bool = True,
    act: Callable[[torch.Tensor], torch.Tensor] = F.relu6,
    pointwise_groups: tuple[int, int] = (1, 1),
    norm_sums: bool = False,
) -> torch.Tensor:
    """One block of a supernet: x [B, C_in, H, W] -> [B, C_out, H / stride, W / stride]."""
    branch = f'{name}e{expand_ratio}'
    y = F.conv2d(x, tensors[f'{branch}.conv_pw.weight'], groups=pointwise_groups[0])
    y = act(batch_norm(tensors, f'{branch}.bn1', y, training))

    # Channel groups are equal in width but for the first, which takes what is left
    width = y.shape[1] // len(groups)
    start, sums = 0, []
    for g, kernel_sizes in enumerate(groups):
        end = start + width + (y.shape[1] % len(groups) if g == 0 else 0)
        total = torch.zeros(())
        for k in kernel_sizes:
            path = f'{branch}.paths.k{k}' if len(groups) == 1 else f'{branch}.paths.g{g}.k{k}'
            z = y[:, start:end]
            z = F.conv2d(z, tensors[f'{path}.conv.weight'], stride=stride, padding=k // 2, groups=end - start)
            total = total + act(batch_norm(tensors, f'{path}.bn', z, training))
        if norm_sums:
            bn = f'{branch}.bn2.{g}'
            total = batch_norm(tensors, f'{bn}.shadows.{len(kernel_sizes) - 1}' if sbn else bn, total, training)
        sums.append(total)
        start = end
    y = torch.cat(sums, 1)

    if f'{branch}.se.conv_reduce.weight' in tensors:
        gate = y.mean((2, 3), keepdim=True)
        gate = F.conv2d(gate, tensors[f'{branch}.se.conv_reduce.weight'], tensors[f'{branch}.se.conv_reduce.bias'])
        gate = act(gate)
        gate = F.conv2d(gate, tensors[f'{branch}.se.conv_expand.weight'], tensors[f'{branch}.se.conv_expand.bias'])
        y = y * torch.sigmoid(gate)

    y = F.conv2d(y, tensors[f'{branch}.conv_pwl.weight'], groups=pointwise_groups[1])
    shadow = f'.shadows.{len(groups[0]) - 1}' if sbn and len(groups) == 1 else ''
    y = batch_norm(tensors, f'{branch}.bn3{shadow}', y, training)
    if stride == 1 and x.shape[1] == y.shape[1]:
        y = y + x
    return y


def supernet(
    tensors: Tensors,
    space: SearchSpace,
    arch: Arch,
    x: torch.Tensor,
    *,
    training: bool,
    sbn: bool = True,
) -> torch.Tensor:
    """The whole supernet with `arch` active: x [B, 3, H, W] -> logits [B, num_classes]."""
    acts = {'relu6': F.relu6, 'relu': F.relu, 'swish': F.silu}
    act = acts[space.act_layer]
    x = F.conv2d(x, tensors['conv_stem.weight'], stride=space.stem_stride, padding=1)
    x = act(batch_norm(tensors, 'bn1', x, training))
    first_stage = 0
    if space.ds_chs is not None:
        first_stage, name = 1, 'blocks.0.0'
        y = F.conv2d(x, tensors[f'{name}.conv_dw.weight'], padding=1, groups=x.shape[1])
        y = act(batch_norm(tensors, f'{name}.bn1', y, training))
        y = F.conv2d(y, tensors[f'{name}.conv_pw.weight'])
        y = batch_norm(tensors, f'{name}.bn2', y, training)
        x = x + y if x.shape == y.shape else y
    stage, position = first_stage, 0
    for i, spec in enumerate(space.blocks):
        if i and (spec.stride > 1 or spec.out_chs != space.blocks[i - 1].out_chs):
            stage, position = stage + 1, 0
        x = choice_block(
            tensors,
            f'blocks.{stage}.{position}.',
            x,
            groups=arch.blocks[i].groups,
            expand_ratio=arch.blocks[i].expand_ratio,
            stride=spec.stride,
            training=training,
            sbn=sbn,
            act=acts[spec.act_layer or space.act_layer],
            pointwise_groups=(spec.exp_groups, spec.pwl_groups),
            norm_sums=space.max_paths > 1 and spec.num_groups > 1,
        )
        position += 1
    x = F.conv2d(x, tensors['conv_head.weight'])
    x = act(batch_norm(tensors, 'bn2', x, training))
    x = x.mean((2, 3))
    return x @ tensors['classifier.weight'].T + tensors['classifier.bias']


def leaf_tensors(model: nn.Module) -> Tensors:
    """Copies of a model's parameters and buffers, the parameters as leaves that take gradients."""
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, _ in model.named_parameters():
        tensors[name].requires_grad_()
    return tensors


def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm statistics and affine parameters of its own, so that taking a wrong one shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 1.5),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
            ):
                if tensor is None:  # a narrower copy of a block takes it from the widest
                    continue
                values = torch.rand(tensor.shape, generator=generator) * (high - low) + low
                tensor.data.copy_(values)
    return model


def active_parameter(name: str, space: SearchSpace, arch: Arch, sbn: bool = True) -> bool:
    """Whether parameter `name` of a supernet takes part when `arch` is active."""
    if not name.startswith('blocks.'):
        return True
    _, stage, position, branch, *rest = name.split('.')
    if space.ds_chs is not None:
        if stage == '0':
            return True
        stage = int(stage) - 1
    index = sum(len(s) for s in space.stages[: int(stage)]) + int(position)
    choice = arch.blocks[index]
    if branch != f'e{choice.expand_ratio}':
        return False
    group = 0
    if space.blocks[index].num_groups > 1 and rest[0] in ('paths', 'bn2'):
        group = int(rest.pop(1).removeprefix('g'))
    if rest[0] == 'paths':
        return rest[1] in [f'k{k}' for k in choice.groups[group]]
    if 'shadows' in rest and sbn:
        return rest[2] == str(len(choice.groups[group]) - 1)
    return True
