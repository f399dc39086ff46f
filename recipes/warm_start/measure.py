"""Score archs of a warm-started supernet at every checkpoint of its training, as it is and recalibrated.

    python recipes/warm_start/measure.py OUTPUT.jsonl RUN [RUN ...] --data-dir imagenette

A RUN is the folder of a training with --checkpoint-hist 99. Scored are the backbone's own arch, the one of most
multiply-adds and 20 random ones, the same in all runs, on 1,000 validation images, evenly spread over the classes. With
--start they are scored before the first step too, epoch 0, when the supernet is a copy of that network.
What is in OUTPUT.jsonl already is skipped, so a run that was cut off goes on.
"""

import argparse
import json
import time
from pathlib import Path

import timm
from timm.data import create_dataset

from timm_mixpath import sample, warm_start
from timm_mixpath.models.cost import cost_table
from timm_mixpath.search.accuracy import evaluate, recalibrate_bn
from timm_mixpath.search.images import SearchData, load_batches, open_search_split, recalibration_batches
from timm_mixpath.train.checkpoint import load_model
from timm_mixpath.utils.memory import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('output', type=Path)
    parser.add_argument('runs', type=Path, nargs='+')
    parser.add_argument('--data-dir', required=True)
    parser.add_argument('--val-split', default='validation')
    parser.add_argument('--start', metavar='DIR', help='model folder of the network that the runs started from')
    parser.add_argument('--epochs', type=int, nargs='*', help='after how many epochs (default: at every checkpoint)')
    parser.add_argument('--num-images', type=int, default=1000)
    parser.add_argument('--num-archs', type=int, default=20)
    parser.add_argument('--recalibration-images', type=int, default=512)
    args = parser.parse_args()

    keep_freed_memory()
    done = set()
    if args.output.exists():
        rows = map(json.loads, args.output.read_text().splitlines())
        done = {(r['run'], r['epoch'], r['arch_name'], r['recalibrated']) for r in rows}
    images: dict[tuple, list] = {}
    for run in args.runs:
        paths = sorted(run.glob('checkpoint-*.pth.tar'), key=lambda p: int(p.name.split('.')[0].split('-')[1]))
        for index, path in enumerate([*paths[: bool(args.start)], *paths]):
            loaded = load_model(path)
            epoch = loaded.epoch + 1
            if args.start and index == 0:
                warm_start(loaded.model, timm.create_model(f'local-dir:{args.start}', pretrained=True))
                epoch = 0
            elif args.epochs and epoch not in args.epochs:
                continue
            supernet, size = loaded.model, tuple(loaded.data_config['input_size'])
            if size not in images:
                val_set = create_dataset('', root=args.data_dir, split=args.val_split)
                train_set = open_search_split(loaded, SearchData(data_dir=args.data_dir), warn=False)[1]
                images[size] = [
                    load_batches(val_set, loaded.data_config, max_images=args.num_images),
                    recalibration_batches(train_set, loaded, args.recalibration_images),
                ]
            val, recal = images[size]
            archs = {'own': supernet.space.default_arch, 'largest': cost_table(supernet).largest('macs')}
            archs |= {f'random{i}': sample(supernet.space, seed=1, step=i) for i in range(args.num_archs)}
            for name, arch in archs.items():
                for recalibrated in (False, True):
                    key = (run.name, epoch, name, recalibrated)
                    if key in done:
                        continue
                    start = time.perf_counter()
                    if recalibrated:
                        with recalibrate_bn(supernet, arch, recal):
                            metrics = evaluate(supernet, val)
                    else:
                        supernet.active_arch = arch
                        metrics = evaluate(supernet, val)
                    row = dict(zip(('run', 'epoch', 'arch_name', 'recalibrated'), key), arch=str(arch), **metrics)
                    row['seconds'] = round(time.perf_counter() - start, 2)
                    with open(args.output, 'a') as f:
                        f.write(json.dumps(row) + '\n')


if __name__ == '__main__':
    main()
