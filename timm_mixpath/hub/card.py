"""The model card of a Hub repo: what is known of a model, and nothing else.

Everything on a card is read from the checkpoint, from the training's summary.csv beside it, from the folder of a
search, or was given. What is not known is left out.
"""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from ..models.cellnet import CellNet
from ..models.cost import count_macs
from ..models.mixpath import BUILTIN_SPACES
from ..models.supernet import Supernet
from ..spaces.backbone import BackboneSpace
from ..spaces.catalog import get_space
from ..train.checkpoint import LoadedModel
from ..train.options import LOCAL_OPTIONS, default_args
from ..utils.recipes import model_recipes
from .records import PLOT, SearchRecord, TrainingRecord, ValidationRecord

__all__ = ['CardDetails', 'make_card']


_PAPER = 'https://arxiv.org/abs/2001.05887'

_CITATION = """@inproceedings{chu2023mixpath,
  title     = {MixPath: A Unified Approach for One-shot Neural Architecture Search},
  author    = {Chu, Xiangxiang and Lu, Shun and Li, Xudong and Zhang, Bo},
  booktitle = {ICCV},
  pages     = {5949--5958},
  year      = {2023}
}"""

# Models whose name is the paper's but whose arch is not: the paper shows theirs in drawings only
_RECONSTRUCTIONS = {'mixpath_a': 'MixPath-A', 'mixpath_b': 'MixPath-B', 'mixpath_c': 'MixPath-c'}

_SPACE_NOTES = {
    's1': "S1 is the paper's CIFAR space; backbone and choices follow the authors' release.",
    's2': 'The paper does not publish the backbone of S2. This one is inferred from the published budgets.',
    's3': 'The paper does not publish the backbone of S3. This one is inferred from the published budgets.',
    'nb101': (
        'The sub-space of NAS-Bench-101 that the paper ranks. Where its batch norms stand is a reconstruction: the '
        "authors' release builds shadow batch norms for it, but does not apply them."
    ),
    'nb201': 'The space is that of NAS-Bench-201, not one of the paper.',
    'nano': 'nano is a small space of timm-mixpath, not one of the paper.',
}

# What a card leaves out: where and how a run was executed, files of that machine, and what `lr` was derived from
_LOCAL_OPTIONS = LOCAL_OPTIONS | {'class_map', 'initial_checkpoint', 'pretrained_path', 'lr_base'}


@dataclass
class CardDetails:
    """What only the owner of a model can tell. None leaves it out.

    Attributes:
        license: Licence of the weights, by its name on the Hub, for example apache-2.0; a model folder or Hub repo may
            name it by itself.
        dataset_id: Data set by its name on the Hub, for example uoft-cs/cifar10.
        dataset_name: Its name for readers, for example CIFAR-10.
        commit: Commit of timm-mixpath that trained the model.
        provenance: Sentences on what the weights come from, and what the licences of that allow.
    """

    license: str | None = None
    dataset_id: str | None = None
    dataset_name: str | None = None
    commit: str | None = None
    provenance: str | None = None


def make_card(
    repo_id: str,
    loaded: LoadedModel,
    details: CardDetails,
    training: TrainingRecord | None = None,
    searched: SearchRecord | None = None,
    validated: ValidationRecord | None = None,
    *,
    dtype: str | None = None,
    revision: str | None = None,
) -> ModelCard:
    """Write the card.

    Args:
        repo_id: `ORG/NAME`.
        loaded: The model.
        details: What its owner tells.
        training: How it was trained, if known.
        searched: How its arch was found, if known.
        validated: What timm's validate.py measured, in the place of what the training did.
        dtype: What the weights are stored as, for the results; None says nothing of it.
        revision: Branch of the repo that the card is for, the main one if None.
    """
    model = loaded.model
    is_supernet = isinstance(model, Supernet)
    name = repo_id.partition('/')[2]
    source = f'hf-hub:{repo_id}' + (f'@{revision}' if revision else '')
    dataset_id = details.dataset_id or _dataset_id(training)
    dataset_name = details.dataset_name or dataset_id

    sections = [
        f'# {name}',
        _what(model, loaded, training, dataset_name),
        _notes(model),
        details.provenance or '',
        '## Use\n\n' + _usage(model, source, training),
        '## Architecture\n\n' + _architecture(model, loaded),
    ]
    metrics = validated.metrics if validated is not None else training.metrics if training is not None else {}
    if metrics:
        sections.append('## Results\n\n' + _results(model, metrics, training, validated, dtype, dataset_name))
    if training is not None:
        sections.append('## Training\n\n' + _training(training, details, dataset_name))
    elif details.commit:
        sections.append(f'## Training\n\nTrained with timm-mixpath at commit `{details.commit}`.')
    if searched is not None:
        sections.append('## Search\n\n' + _search(searched))
    sections += [
        '## Limits\n\n' + _limits(model, loaded, training, metrics),
        f'## Citation\n\n```bibtex\n{_CITATION}\n```',
    ]

    results = []
    if training is not None and dataset_id and not is_supernet:  # a supernet is not one model with one accuracy
        # Where the images were not read from the Hub, the splits there may have other names
        is_from_hub = validated is None and _dataset_id(training) == dataset_id
        split = str(training.args.val_split).partition('.')[0] if is_from_hub else None
        results = _eval_results(metrics, split, dataset_id, dataset_name)
    data = ModelCardData(
        library_name='timm',
        pipeline_tag=None if is_supernet else 'image-classification',
        license=details.license,
        tags=[
            'supernet' if is_supernet else 'image-classification',
            'timm',
            'timm-mixpath',
            'neural-architecture-search',
            'arxiv:2001.05887',
        ],
        datasets=[dataset_id] if dataset_id else None,
        metrics=['accuracy'] if results else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return ModelCard(f'---\n{data.to_yaml()}\n---\n\n' + '\n\n'.join(s for s in sections if s) + '\n')


def _dataset_id(training: TrainingRecord | None) -> str | None:
    """Return the Hub's name of the data set, where the training read it from the Hub."""
    dataset = getattr(training.args, 'dataset', '') if training else ''
    kind, _, name = dataset.partition('/')
    return name if kind in ('hfds', 'hfids') and name else None


def _what(model: nn.Module, loaded: LoadedModel, training: TrainingRecord | None, dataset_name: str | None) -> str:
    architecture = model.pretrained_cfg['architecture']
    size = _size(loaded)
    on = f' on {dataset_name}' if dataset_name else ''
    trained = f' trained{on}' if training and on else ''
    space, after = f'search space `{model.space.name}`', f' of [MixPath]({_PAPER})'
    if isinstance(model.space, BackboneSpace):
        space, after = f"the search space around timm's `{model.space.name}`", f', after [MixPath]({_PAPER})'
        after += ',' if trained else ''
    if isinstance(model, Supernet):
        bn = {
            'sbn': 'Shadow Batch Normalization',
            'bn': 'a single batch norm behind the sum of paths',
            'none': 'no norm behind the sum of paths',
        }[model.sum_norm]
        return (
            f'A one-shot supernet (`{architecture}`) that holds all {model.space.size:.3g} networks of {space} with up '
            f'to m = {model.space.max_paths} paths per sum, with {bn}, after [MixPath]({_PAPER}).'
            f'{" Trained" + on + "." if training and on else ""} It is made to be searched, not to classify images as '
            f'it is. {model.num_classes} classes, images of {size}.'
        )
    return (
        f'An image classifier (`{architecture}`) of {space}{after}{trained}. {model.num_classes} classes, images of '
        f'{size}.'
    )


def _notes(model: nn.Module) -> str:
    architecture = model.pretrained_cfg['architecture']
    notes = []
    if architecture in _RECONSTRUCTIONS:
        paper_name = _RECONSTRUCTIONS[architecture]
        notes.append(
            f'**A reconstruction.** The authors did not publish the layers of {paper_name} other than in a drawing. '
            f'`{architecture}` is the own reconstruction of timm-mixpath'
            f'{"" if architecture == "mixpath_c" else " within the published budget"}: neither its arch '
            f"nor its weights are the authors', and accuracies that the paper reports for {paper_name} are not its own."
        )
    if isinstance(model.space, BackboneSpace):
        notes.append(
            f"It is [timm](https://github.com/huggingface/pytorch-image-models)'s `{model.space.name}` with other "
            'depthwise kernels, sums of them, expansions, and blocks left out. That a supernet starts from a '
            'pretrained network is of timm-mixpath, not of the paper.'
        )
    else:
        notes.append(_SPACE_NOTES.get(model.space.name, ''))
    notes += [f'{note[:1].upper()}{note[1:]}.' for note in model.pretrained_cfg.get('notes') or ()]
    notes.append('Made with timm-mixpath, an independent implementation that is not by the authors of the paper.')
    return '\n\n'.join(note for note in notes if note)


def _usage(model: nn.Module, source: str, training: TrainingRecord | None) -> str:
    lines = ['import timm_mixpath  # registers the models with timm', 'import timm', '']
    if model.space.name not in BUILTIN_SPACES and not isinstance(model.space, BackboneSpace):  # repr makes it
        lines[0] = 'import timm_mixpath'
        lines[2:] = [
            'from timm_mixpath import BlockSpec, SearchSpace',
            '',
            f'timm_mixpath.register_space({get_space(model.space.name)!r})',
            '',
        ]
    if isinstance(model, Supernet):
        lines += [
            f"supernet = timm.create_model('{source}', pretrained=True).eval()",
            f"model = supernet.extract('{model.active_arch}')  # any arch of the space, with inherited weights",
        ]
        text = '```python\n' + '\n'.join(lines) + '\n```\n\nTo search it:\n\n```bash\n'
        text += f'timm-mixpath search --checkpoint {source} --data-dir DIR --output search\n```'
        holdout = getattr(training.args, 'search_holdout', None) if training else None
        if holdout:
            text += (
                f'\n\nThe supernet was trained without a share of {holdout:g} of the training images. With the same '
                f'data set and `--search-holdout {holdout:g}` the search scores on these; other unseen images are '
                'named with `--search-split`.'
            )
        return text
    lines += [
        f"model = timm.create_model('{source}', pretrained=True).eval()",
        'data_config = timm.data.resolve_model_data_config(model)',
        'transform = timm.data.create_transform(**data_config, is_training=False)  # PIL image -> [C, H, W]',
    ]
    return '```python\n' + '\n'.join(lines) + '\n```'


def _architecture(model: nn.Module, loaded: LoadedModel) -> str:
    params = sum(p.numel() for p in model.parameters())
    rows = []
    if isinstance(model, Supernet):
        rows.append(f'{params / 1e6:.3f} M parameters, shared by {model.space.size:.3g} networks.\n')
        if isinstance(model, CellNet):
            return '\n'.join([*rows, _cells(model)])
        rows += ['| block | channels | stride | choices |', '|---|---|---|---|']
        for index, spec in enumerate(model.space.blocks):
            rows.append(f'| {index} | {spec.out_chs} | {spec.stride} | {model.space.num_choices(index)} |')
        return '\n'.join(rows)
    macs = sum(count_macs(model, loaded.data_config['input_size']).values())
    rows.append(
        f'{macs / 1e6:.2f} M MACs (multiply-adds of convolutions and linear layers) for one image of {_size(loaded)}, '
        f'{params / 1e6:.3f} M parameters.\n\n`{model.arch}`\n'
    )
    if isinstance(model, CellNet):
        return '\n'.join([*rows, _cells(model)])
    legend = '`k` is the depthwise kernel, `e` the expansion'
    if any(len(kernels) > 1 for choice in model.arch.blocks for kernels in choice.groups):
        legend = 'Kernels joined by `+` are depthwise convolutions whose outputs are summed, `e` is the expansion'
    if any(len(choice.groups) > 1 for choice in model.arch.blocks):
        legend += ', `.` separates channel groups'
    if any(choice.is_skip for choice in model.arch.blocks):
        legend += ', of a block to `skip` the residual connection remains'
    rows.append(f'{legend}.\n')
    rows += ['| block | channels | stride | choice |', '|---|---|---|---|']
    for index, (spec, choice) in enumerate(zip(model.space.blocks, model.arch.blocks)):
        rows.append(f'| {index} | {spec.out_chs} | {spec.stride} | `{choice}` |')
    return '\n'.join(rows)


def _cells(model: CellNet) -> str:
    norm = {'sbn': 'one batch norm per number of paths', 'bn': 'one batch norm', 'none': 'nothing'}[model.sum_norm]
    return (
        f'Three stages of {model.num_cells} cells, {model.width} channels in the first and twice as many in each next '
        f'one; behind every sum of paths stands {norm}.'
    )


def _results(
    model: nn.Module,
    metrics: dict[str, float],
    training: TrainingRecord | None,
    validated: ValidationRecord | None,
    dtype: str | None,
    dataset_name: str | None,
) -> str:
    split = f'split `{training.args.val_split}`' if validated is None else 'the validation images'
    split += f' of {dataset_name}' if dataset_name else ''
    names = {'top1': 'top-1 (%)', 'top5': 'top-5 (%)', 'loss': 'cross-entropy'}
    shown = {names[name]: f'{value:.2f}' for name, value in metrics.items()}
    text = f'| measured on | {" | ".join(shown)} |\n|---|{"---|" * len(shown)}\n'
    text += f'| {split} | {" | ".join(shown.values())} |\n\n'
    if validated is not None:
        size = f'{validated.img_size}x{validated.img_size} pixels'
        text += (
            f"Measured with timm's `validate.py` at {size} (crop {validated.crop_pct:g}), with the weights as stored"
        )
        text += f' in {dtype}.' if dtype else '.'
    else:
        text += 'Measured in the training'
        if training.epoch is not None:
            text += f' after epoch {training.epoch + 1} of {training.args.epochs}'
        text += ', one run.'
        if dtype:
            text += f' The weights were stored in {dtype} after that.'
    if training is not None and training.is_best:
        text += (
            f' The epoch was chosen by its score on split `{training.args.val_split}`, so a figure measured there is a '
            'little too good.'
        )
    if isinstance(model, Supernet):
        text += f' It is the score of one network, `{model.active_arch}`, with the weights that it inherits.'
    return text


def _training(training: TrainingRecord, details: CardDetails, dataset_name: str | None) -> str:
    args = training.args
    facts = []
    if recipe := _recipe(args):
        facts.append(recipe)
    if dataset := dataset_name or getattr(args, 'dataset', ''):
        facts.append(f'data set {dataset}')
    facts.append(f'training split `{args.train_split}`')
    if getattr(args, 'search_holdout', None):
        facts.append(f'{args.search_holdout:g} of its images held out for a search')
    facts.append(f'{args.epochs} epochs, seed {args.seed}')
    is_continued = any(getattr(args, name, '') for name in ('initial_checkpoint', 'pretrained', 'warm_start'))
    if is_continued:
        facts.append('started from other weights, not from scratch: this is the last training alone')
    if teacher := getattr(args, 'kd_model_name', None):
        facts.append(
            'distilled from ' + ('a network in a folder' if teacher.startswith('local-dir:') else f'`{teacher}`')
        )
    if getattr(args, 'world_size', 1) > 1:
        facts.append(f'{args.world_size} processes, each with the batch size below')
    if training.is_ema:
        facts.append('the weights are the moving average of the training')
    if details.commit:
        facts.append(f'timm-mixpath at commit `{details.commit}`')
    text = '\n'.join(f'- {fact}' for fact in facts)
    defaults = vars(default_args())
    options = {
        key: _without_place(value)
        for key, value in vars(args).items()
        if key in defaults and key not in _LOCAL_OPTIONS and value != defaults[key]
    }
    to_name = []
    if is_continued:
        to_name.append('the weights that it started from')
    if str(options.get('kd_model_name')).startswith('local-dir:'):
        del options['kd_model_name']
        to_name.append('its teacher (`--kd-model-name`)')
    missing = f', which has to be told {" and ".join(to_name)}' if to_name else ''
    return (
        f'{text}\n\nOptions that differ from the defaults of `timm-mixpath train`, as a recipe for its `-c`{missing}:'
        f'\n\n```yaml\n{yaml.safe_dump(options, sort_keys=True).strip()}\n```'
    )


def _without_place(value: Any) -> Any:
    """An option without the place of a folder on the machine of the training."""
    kind, _, path = value.partition(':') if isinstance(value, str) else ('', '', '')
    return f'{kind}:{Path(path).name}' if kind == 'local-dir' else value


def _recipe(args: Namespace) -> str | None:
    """Say which recipe of the package a run had the options of, with up to three exceptions."""
    had = vars(args)
    for name, values in model_recipes(args.model).items():
        other = []
        for key, value in values.items():
            if isinstance(value, dict):
                same = value.items() <= (had.get(key) or {}).items()
            else:
                same = key in _LOCAL_OPTIONS or had.get(key) == value
            if not same:
                other.append(f'{key} ({had.get(key)}, not {value})')
        if len(other) <= 3:
            return f'options of recipe `{name}` of timm-mixpath' + (f' except {", ".join(other)}' if other else '')
    return None


def _search(searched: SearchRecord) -> str:
    front, config, data = searched.front, searched.front['config'], searched.front['fingerprint']
    objectives = ', '.join(
        name if weight == 1 else f'{name} (weight {weight:g})' for name, weight in config['objectives'].items()
    )
    facts = [
        f'{config["algorithm"]}, {front["num_evaluations"]} evaluations, seed {config["seed"]}',
        f'minimised: {objectives}',
        f'm = {front["max_paths"]}',
    ]
    if config['algorithm'] == 'nsga2':
        facts[0] += (
            f' (population {config["population"]}, {config["offspring"]} offspring in each of {config["generations"]} '
            'generations)'
        )
    limits = [
        f'{key.replace("_", " ").replace("macs", "MACs")} {config[key]:,}'
        for key in ('min_macs', 'max_macs', 'min_params', 'max_params')
        if config.get(key) is not None
    ]
    limits += [
        f'{key.replace("_", " ")} {config[key]:g} ms'
        for key in ('min_latency', 'max_latency')
        if config.get(key) is not None
    ]
    if limits:
        facts.append('limits: ' + ', '.join(limits))
    if 'latency_of' in data:
        facts.append(f'latency predicted from a table: {data["latency_of"]}')
    cost_size, cost_classes = data.get('cost_input_size'), data.get('cost_num_classes')
    if cost_size and cost_size != data.get('input_size'):
        facts.append(f'costs counted for {cost_size[1]}x{cost_size[2]} pixels and {cost_classes} classes')
    if 'num_images' in data:
        share = f'a held-out share of {data["holdout"]:g} of ' if data.get('holdout') else ''
        size = f', {data["input_size"][1]}x{data["input_size"][2]} pixels each' if data.get('input_size') else ''
        facts.append(f'scored on {data["num_images"]:,} images of {share}split `{data["split"]}`{size}')
    if data.get('recalibration_images'):
        facts.append(f'batch norms recalibrated with {data["recalibration_images"]:,} images for every candidate')
    if front.get('hypervolume') is not None:
        facts.append(f'hypervolume of the front {front["hypervolume"]:.3f}')
    if searched.candidate is not None:
        chosen = ' and chosen' if searched.candidate.get('chosen') else ''
        loss = f'a loss of {searched.candidate["metrics"]["loss"]:.4f} and ' if 'loss' in config['objectives'] else ''
        facts.append(
            f'this arch was found{chosen} there with {loss}an error of {searched.candidate["error"]:.2f} % '
            "with the supernet's weights"
        )
        if searched.candidate.get('latency') is not None:
            measured = searched.candidate['metrics'].get('latency_ms')
            facts.append(
                f'its latency: {searched.candidate["latency"]:.2f} ms predicted'
                + (f', {measured:.2f} ms measured' if measured else '')
            )
    text = '\n'.join(f'- {fact}' for fact in facts)
    if searched.plot is not None:
        text += f'\n\n![How good and how costly is what the search evaluated, and its Pareto front]({PLOT})'
    return text


def _limits(model: nn.Module, loaded: LoadedModel, training: TrainingRecord | None, metrics: dict[str, float]) -> str:
    text = (
        f'It knows the {model.num_classes} classes that it was trained on, and is meant for images of {_size(loaded)}, '
        'prepared as its config says. Its robustness, its calibration and its behaviour on other images have not been '
        'measured.'
    )
    if training is None:
        accuracy = '' if metrics else ', and how accurate it is,'
        text += f' How it was trained{accuracy} is not recorded here.'
    elif not metrics:
        text += ' Its accuracy was not measured in the training.'
    return text


def _eval_results(
    metrics: dict[str, float], split: str | None, dataset_id: str, dataset_name: str | None
) -> list[EvalResult]:
    names = {'top1': 'Top-1 accuracy (%)', 'top5': 'Top-5 accuracy (%)'}
    return [
        EvalResult(
            task_type='image-classification',
            task_name='Image Classification',
            dataset_type=dataset_id,
            dataset_name=dataset_name or dataset_id,
            dataset_split=split,
            metric_type='accuracy',
            metric_name=text,
            metric_value=round(metrics[name], 3),
        )
        for name, text in names.items()
        if name in metrics
    ]


def _size(loaded: LoadedModel) -> str:
    channels, height, width = loaded.data_config['input_size']
    return f'{height}x{width}' + ('' if channels == 3 else f' with {channels} channel{"s" if channels > 1 else ""}')
