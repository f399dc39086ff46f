"""The commands export and push."""

import argparse
from pathlib import Path

from ..hub.card import CardDetails
from ..hub.export import export
from ..hub.publish import PushResult, check_repo_id, push, push_packaged, write_packaged_repo, write_repo
from ..models.pretrained import packaged_weights
from ..search.images import SearchData
from ..utils.errors import UsageError
from ..utils.numbers import parse_count
from .common import add_checkpoint_options, add_image_options, from_args, like, setup_logging

__all__ = ['add_export', 'add_push', 'run_export', 'run_push']


def add_export(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_checkpoint_options(parser, '*.pth.tar of a run')
    add('--arch', metavar='TEXT', help='sub-network of a supernet, with the weights it inherits')
    add('--output', required=True, metavar='DIR', help='model folder to make')
    add(
        '--recalibration-images',
        type=parse_count,
        default=0,
        metavar='N',
        help='recalibrate the batch norms of --arch with as many training images, the same as a search takes with the '
        'same options',
    )
    _add_stored(parser)
    add_image_options(parser, scored=False)


def _add_stored(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--dtype',
        choices=('float32', 'float16', 'bfloat16'),
        help="what the weights are stored as; loaded, they are of the model's dtype (default: float32)",
    )
    parser.add_argument(
        '--img-size',
        type=int,
        metavar='N',
        help='size of the images that the model is for, in pixels (default: those of its training)',
    )


def run_export(args: argparse.Namespace) -> None:
    export(
        args.checkpoint,
        args.output,
        args.arch,
        recalibration_images=args.recalibration_images,
        data=from_args(SearchData, args),
        like=like(args),
        dtype=args.dtype,
        img_size=args.img_size,
    )
    print(f"timm.create_model('local-dir:{args.output}', pretrained=True)  # after `import timm, timm_mixpath`")


def add_push(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_checkpoint_options(parser, '*.pth.tar of a run', required=False)
    add('--repo-id', metavar='ORG/NAME', help='for example me/mixpath_nano.cifar10')
    add(
        '--packaged',
        action='store_true',
        help='publish all weights that ship inside the package, one repo each, in the place of --checkpoint',
    )
    add('--org', help='organisation or user for --packaged')
    add('--private', action='store_true', help='make a new repo private')
    add('--revision', metavar='BRANCH', help='branch to push to, made if needed (default: main)')
    add('--message', metavar='TEXT', help='commit message')
    add('--dry-run', action='store_true', help='write the files into a folder and push nothing')
    add('--output', metavar='DIR', help='folder of --dry-run (default: NAME; with --packaged, folder of the folders)')
    _add_stored(parser)

    add = parser.add_argument_group('model card (what is not given and not recorded is left out)').add_argument
    add(
        '--search', metavar='DIR', help='output folder of the search that found the arch, or that searched the supernet'
    )
    add(
        '--results',
        metavar='FILE',
        help="accuracy of the weights as stored: what timm's validate.py wrote with --results-file FILE "
        '--results-format json',
    )
    add(
        '--license', metavar='NAME', help='licence of the weights, for example apache-2.0 (default: that of the source)'
    )
    add('--dataset-id', metavar='NAME', help='data set by its name on the Hub, for example uoft-cs/cifar10')
    add('--dataset-name', metavar='TEXT', help='its name for readers, for example CIFAR-10')
    add('--commit', metavar='SHA', help='commit of timm-mixpath that trained the model')
    add('--provenance', metavar='TEXT', help='what the weights come from, and what the licences of that allow')


def run_push(args: argparse.Namespace) -> None:
    setup_logging()
    if args.output and not args.dry_run:
        raise UsageError(f'--output {args.output} is the folder of --dry-run; add --dry-run, or leave it out')
    if args.packaged:
        _push_packaged(args)
        return
    if args.org:
        raise UsageError(f'--org {args.org} is for --packaged; name a repo with --repo-id {args.org}/NAME')
    for name in ('checkpoint', 'repo_id'):
        if not getattr(args, name):
            raise UsageError(f'--{name.replace("_", "-")} is missing; or publish the packaged weights with --packaged')
    details = from_args(CardDetails, args)
    check_repo_id(args.repo_id)
    name = args.repo_id.partition('/')[2]
    what = dict(
        details=details,
        search=args.search,
        results=args.results,
        dtype=args.dtype,
        img_size=args.img_size,
        like=like(args),
    )
    target = args.repo_id + (f', branch {args.revision}' if args.revision else '')
    if args.dry_run:
        folder = Path(args.output or name)
        files = write_repo(args.checkpoint, args.repo_id, folder, revision=args.revision, **what)
        _print_files(target, folder, files)
        return
    result = push(
        args.checkpoint,
        args.repo_id,
        private=args.private,
        revision=args.revision,
        message=args.message,
        **what,
    )
    _print_result(result)
    source = f'hf-hub:{args.repo_id}' + (f'@{args.revision}' if args.revision else '')
    print(f"timm.create_model('{source}', pretrained=True)  # after `import timm, timm_mixpath`")


def _push_packaged(args: argparse.Namespace) -> None:
    for name in _OF_ONE_MODEL:
        if getattr(args, name):
            option = name.removeprefix('model_') if name == 'model_config' else name
            raise UsageError(f'--{option.replace("_", "-")} is of a push of one model, not of --packaged; leave it out')
    if not args.org:
        raise UsageError('--packaged needs the organisation or user to publish under: --org ORG')
    if args.dry_run:
        for name in packaged_weights():
            repo_id = f'{args.org}/{name}'
            check_repo_id(repo_id)
            folder = Path(args.output or '.') / name
            _print_files(repo_id, folder, write_packaged_repo(name, repo_id, folder))
        return
    for result in push_packaged(args.org, private=args.private, message=args.message):
        _print_result(result)


# What the cards of packaged weights say was decided when they were packaged
_OF_ONE_MODEL = (
    *('checkpoint', 'repo_id', 'revision', 'dtype', 'img_size', 'search', 'results', 'license', 'commit', 'provenance'),
    *('dataset_id', 'dataset_name', 'model', 'model_kwargs', 'model_config'),
)


def _print_files(target: str, folder: Path, files: list[str]) -> None:
    print(f'would push to {target} in one commit:')
    for file in files:
        print(f'  {(folder / file).stat().st_size:>12,}  {folder / file}')


def _print_result(result: PushResult) -> None:
    if result.created:
        print(f'pushed to {result.url}, commit {result.commit[:12]}: {", ".join(result.files)}')
    else:
        print(f'nothing to push: {result.url} holds the same content, commit {result.commit[:12]}')
