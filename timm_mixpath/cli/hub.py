"""The commands export and push."""

import argparse
from pathlib import Path

from ..utils.errors import UsageError
from ..utils.numbers import parse_count
from .common import add_checkpoint_options, from_args, like, setup_logging

__all__ = ['add_export', 'add_push', 'run_export', 'run_push']


def add_export(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_checkpoint_options(parser, '*.pth.tar of a run')
    add('--arch', metavar='TEXT', help='sub-network of a supernet, with the weights it inherits')
    add('--output', required=True, metavar='DIR', help='model folder to make')
    add(
        '--recalibration-images', type=parse_count, default=0, metavar='N', help='recalibrate the batch norms of --arch'
    )
    add('--data-dir', metavar='DIR', help='where the images are (default: as in the training of the supernet)')


def run_export(args: argparse.Namespace) -> None:
    from ..hub.export import export
    from ..search.images import SearchData

    export(
        args.checkpoint,
        args.output,
        args.arch,
        recalibration_images=args.recalibration_images,
        data=SearchData(data_dir=args.data_dir),
        like=like(args),
    )
    print(f"timm.create_model('local-dir:{args.output}', pretrained=True)  # after `import timm, timm_mixpath`")


def add_push(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_checkpoint_options(parser, '*.pth.tar of a run')
    add('--repo-id', required=True, metavar='ORG/NAME', help='for example me/mixpath_nano.cifar10')
    add('--private', action='store_true', help='make a new repo private')
    add('--revision', metavar='BRANCH', help='branch to push to, made if needed (default: main)')
    add('--message', metavar='TEXT', help='commit message')
    add('--dry-run', action='store_true', help='write the files into a folder and push nothing')
    add('--output', metavar='DIR', help='folder of --dry-run (default: NAME)')

    add = parser.add_argument_group('model card (what is not given and not recorded is left out)').add_argument
    add(
        '--search', metavar='DIR', help='output folder of the search that found the arch, or that searched the supernet'
    )
    add('--license', metavar='NAME', help='licence of the weights, for example apache-2.0')
    add('--dataset-id', metavar='NAME', help='data set by its name on the Hub, for example uoft-cs/cifar10')
    add('--dataset-name', metavar='TEXT', help='its name for readers, for example CIFAR-10')
    add('--commit', metavar='SHA', help='commit of timm-mixpath that trained the model')


def run_push(args: argparse.Namespace) -> None:
    from ..hub.card import CardDetails
    from ..hub.publish import check_repo_id, push, write_repo

    setup_logging()
    details = from_args(CardDetails, args)
    check_repo_id(args.repo_id)
    name = args.repo_id.partition('/')[2]
    if args.output and not args.dry_run:
        raise UsageError(f'--output {args.output} is the folder of --dry-run; add --dry-run, or leave it out')
    target = args.repo_id + (f', branch {args.revision}' if args.revision else '')
    if args.dry_run:
        folder = Path(args.output or name)
        files = write_repo(
            args.checkpoint,
            args.repo_id,
            folder,
            details=details,
            search=args.search,
            revision=args.revision,
            like=like(args),
        )
        print(f'would push to {target} in one commit:')
        for file in files:
            print(f'  {(folder / file).stat().st_size:>12,}  {folder / file}')
        return
    result = push(
        args.checkpoint,
        args.repo_id,
        private=args.private,
        revision=args.revision,
        details=details,
        search=args.search,
        message=args.message,
        like=like(args),
    )
    if result.created:
        print(f'pushed to {result.url}, commit {result.commit[:12]}: {", ".join(result.files)}')
    else:
        print(f'nothing to push: {result.url} holds the same content, commit {result.commit[:12]}')
    source = f'hf-hub:{args.repo_id}' + (f'@{args.revision}' if args.revision else '')
    print(f"timm.create_model('{source}', pretrained=True)  # after `import timm, timm_mixpath`")
