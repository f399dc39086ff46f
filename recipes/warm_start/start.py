"""Write the weights that a supernet starts with: those of a fine-tuned tf_efficientnet_lite0, before any step.

python recipes/warm_start/start.py TEACHER OUTPUT.safetensors
"""

import argparse
import os
from pathlib import Path

import timm
from safetensors.torch import save_file

from timm_mixpath import warm_start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('teacher', type=Path, help='model folder of the fine-tuned network')
    parser.add_argument('output', type=Path)
    args = parser.parse_args()
    source = timm.create_model(f'local-dir:{args.teacher}', pretrained=True)
    supernet = timm.create_model('mixpath_supernet', backbone='tf_efficientnet_lite0', num_classes=source.num_classes)
    warm_start(supernet, source)
    whole = args.output.with_name(f'{args.output.name}.whole')
    save_file({key: value.contiguous() for key, value in supernet.state_dict().items()}, whole)
    os.replace(whole, args.output)


if __name__ == '__main__':
    main()
