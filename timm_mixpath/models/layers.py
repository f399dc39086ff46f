"""Shadow Batch Normalization, an activation that trains in less memory, and folding of batch norms."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = [
    'ActiveConv2d',
    'ActiveShadowBatchNorm2d',
    'ReLU6FromOutput',
    'ShadowBatchNorm2d',
    'fold_bn',
    'fuse_conv_bn',
    'keep_layout_of_gradient',
    'run_out_of_place',
    'saves_its_output',
    'set_num_paths',
    'sum_paths',
    'sum_statistics',
]


class _ReLU6InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        torch.ops.aten.hardtanh_(x, 0.0, 6.0)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        # the gradient is 0 where the input was clamped, and there the output is 0 or 6
        return torch.ops.aten.hardtanh_backward(grad, y, 0.0, 6.0)


class ReLU6FromOutput(nn.ReLU6):
    """ReLU6 whose backward pass works from its output.

    torch's own in-place ReLU6 keeps a copy of its input. The output is kept anyway, by the convolution behind it.
    Values and gradients are the same.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.inplace and self.training and torch.is_grad_enabled() and x.requires_grad:
            return _ReLU6InPlace.apply(x)
        return super().forward(x)


def saves_its_output(act_layer: Any) -> bool:
    """Whether an activation works from its output in the backward pass, so that it costs nothing to run in place.

    Others keep their input, and run in place they have to copy it first: SiLU does.
    """
    return isinstance(act_layer, type) and issubclass(act_layer, (nn.ReLU, ReLU6FromOutput))


def run_out_of_place(model: nn.Module) -> None:
    """Let the activations of a model that keep their input not run in place, where they copy it first.

    timm runs all of them in place. Values and gradients stay the same to the bit, and the memory of a training, too.
    """
    for module in model.modules():
        if getattr(module, 'inplace', False) is True and not saves_its_output(type(module)):
            module.inplace = False


def keep_layout_of_gradient(model: nn.Module) -> None:
    """Let the gradient of what a model pools be laid out as that is, where it is channels-last.

    The gradient of a mean repeats one value by a stride of 0, out of which the backward pass of most activations makes
    a tensor that is not channels-last. The batch norm in front of them is three to five times as slow then on a CPU:
    torch has no kernel for an input and a gradient of different layouts. Values stay the same.
    """
    for module in model.modules():
        if isinstance(module, SelectAdaptivePool2d):
            module.register_forward_pre_hook(_lay_out_gradient)


def _lay_out_gradient(pool: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    x = inputs[0]
    if x.requires_grad and x.is_contiguous(memory_format=torch.channels_last) and not torch.compiler.is_compiling():
        x.register_hook(partial(torch.Tensor.contiguous, memory_format=torch.channels_last))


class ShadowBatchNorm2d(nn.Module):
    """Shadow Batch Normalization (SBN): one batch norm per number of active paths.

    In a block that sums k paths, E[sum] is about k times and Var[sum] about k^2 times that of one path, since the
    features of different paths are close to each other. A single batch norm behind the sum would mix these
    distributions. SBN keeps `num_shadows` of them, and only number k normalises, and is trained, when k paths are
    active (MixPath, arXiv 2001.05887).

    The members are ordinary `nn.BatchNorm2d`, so SyncBN conversion, `timm.utils.distribute_bn`, EMA and BN folding
    see what they know.

    Args:
        num_features: Number of channels C.
        num_shadows: Largest number of active paths, m in the paper.
        **kwargs: `eps`, `momentum`, `affine`, `track_running_stats`, `device`, `dtype` of `nn.BatchNorm2d`.

    Raises:
        ValueError: `num_shadows` is below 1.

    Examples:

        ```python
        sbn = ShadowBatchNorm2d(64, num_shadows=3)
        y = sbn(conv3(x) + conv5(x), 2)
        ```
    """

    def __init__(self, num_features: int, num_shadows: int, **kwargs: Any) -> None:
        super().__init__()
        if num_shadows < 1:
            raise ValueError(f'num_shadows={num_shadows} must be at least 1')
        self.num_features = num_features
        self.num_shadows = num_shadows
        self.shadows = nn.ModuleList([nn.BatchNorm2d(num_features, **kwargs) for _ in range(num_shadows)])

    def forward(self, x: torch.Tensor, num_paths: int) -> torch.Tensor:
        """Normalise a sum of paths.

        Args:
            x: Sum of `num_paths` paths [B, C, H, W].
            num_paths: Number of active paths k, 1..num_shadows.

        Returns:
            Normalised tensor [B, C, H, W].

        Raises:
            ValueError: `num_paths` is out of range.
        """
        if num_paths < 1 or num_paths > self.num_shadows:
            raise ValueError(f'num_paths={num_paths} is out of range, allowed are 1 to {self.num_shadows}')
        return self.shadows[num_paths - 1](x)

    def extra_repr(self) -> str:
        return f'{self.num_features}, num_shadows={self.num_shadows}'


class ActiveShadowBatchNorm2d(ShadowBatchNorm2d):
    """A `ShadowBatchNorm2d` that is told beforehand how many paths are active, so that it is called as any norm.

    Attributes:
        num_paths: Number of active paths in front of it; 0 where nothing runs.
    """

    num_paths = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return super().forward(x, self.num_paths)


class ActiveConv2d(nn.ModuleList):
    """Convolutions, one per number of active paths: what a convolution and shadows behind it become when folded.

    Args:
        convs: For 1, 2, ... active paths.
        num_paths: Number of active paths.
    """

    def __init__(self, convs: Iterable[nn.Conv2d], num_paths: int) -> None:
        super().__init__(convs)
        self.num_paths = num_paths

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C_in, H, W] -> [B, C_out, H, W]."""
        return self[self.num_paths - 1](x)


def sum_statistics(
    mean: torch.Tensor, var: torch.Tensor, num_paths: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and variance, [C] each, of a sum of equal paths from those of one.

    The mean grows with their number and the variance with its square; with `eps` a batch norm of these statistics gives
    for the sum what one of `mean` and `var` gives for a path.
    """
    if num_paths == 1:
        return mean, var  # bit for bit
    return mean * num_paths, (var + eps) * num_paths**2 - eps


def set_num_paths(module: nn.Module, num_paths: int) -> None:
    """Tell a module behind a sum how many paths are active, if it makes a difference to it."""
    if hasattr(module, 'num_paths'):
        module.num_paths = num_paths


def fold_bn(parent: nn.Module, conv: str, bn: str) -> None:
    """Fold the batch norm `bn` inside a module into the convolution `conv`; another kind of norm is left alone."""
    norm = parent.get_submodule(bn)
    if isinstance(norm, nn.BatchNorm2d):
        parent.set_submodule(conv, fuse_conv_bn(parent.get_submodule(conv), norm))
        parent.set_submodule(bn, getattr(norm, 'act', nn.Identity()))  # timm's BatchNormAct2d holds the activation


def fuse_conv_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    """Return the convolution that computes what `conv` and the batch norm behind it do, in the mode of `conv`."""
    # torch wants both in eval mode, but timm's scripts fold before they call eval()
    training = conv.training
    fused = fuse_conv_bn_eval(conv.eval(), bn.eval())
    for module in (conv, bn, fused):
        module.train(training)
    return fused


def sum_paths(outputs: list[torch.Tensor]) -> torch.Tensor:
    """Sum the outputs of paths, all [B, C, H, W]."""
    x = outputs[0]
    for i, y in enumerate(outputs[1:]):
        # The first sum needs memory of its own, an activation saved its input there; the others can reuse it.
        x = x + y if i == 0 else x.add_(y)
    return x
