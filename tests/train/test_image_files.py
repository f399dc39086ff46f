import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import fails
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from timm_mixpath.search.images import load_batches
from timm_mixpath.train.cached_loader import CachedLoader
from timm_mixpath.train.data import iterate, open_dataset
from timm_mixpath.train.image_files import ImageFiles, to_mode
from timm_mixpath.utils.errors import RunError

CONFIG = dict(input_size=(3, 32, 32), mean=(0.0,) * 3, std=(1.0,) * 3, interpolation='bilinear', crop_pct=1.0)
GRAY = np.arange(32 * 32, dtype=np.uint32).reshape(32, 32) % 256


def encoded(image: Image.Image, kind: str) -> Image.Image:
    """The image as it comes back from a file."""
    file = io.BytesIO()
    image.save(file, kind)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'PPM'])
@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_files_of_16_bits_are_scaled(kind: str, mode: str) -> None:
    image = encoded(Image.fromarray((GRAY * 257).astype(np.uint16)), kind)
    pixels = np.asarray(to_mode(image, mode)).reshape(32, 32, -1)
    np.testing.assert_array_equal(pixels, np.repeat(GRAY[:, :, None], len(mode), 2))
    noisy = encoded(Image.fromarray(np.clip(GRAY.astype(int) * 257 + 128, 0, 65535).astype(np.uint16)), kind)
    np.testing.assert_array_equal(np.asarray(to_mode(noisy, 'L')), GRAY)  # rounded, not cut off


@pytest.mark.parametrize('mode', ['I;16', 'I;16L', 'I;16B'])
def test_every_order_of_16_bits(mode: str) -> None:
    raw = (GRAY * 257).astype('>u2' if mode.endswith('B') else '<u2').tobytes()
    np.testing.assert_array_equal(np.asarray(to_mode(Image.frombytes(mode, (32, 32), raw), 'L')), GRAY)


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV', 'LA', 'PA', 'RGBX', 'RGBa'])
def test_modes_of_8_bits_are_those_of_pillow(mode: str) -> None:
    rgb = Image.fromarray(np.stack([GRAY, GRAY[::-1], GRAY.T], 2).astype(np.uint8))
    image = rgb.convert({'RGBa': 'RGBA', 'PA': 'LA'}.get(mode, mode)).convert(mode)
    for target in ('RGB', 'L'):
        assert to_mode(image, target).tobytes() == image.convert(target).tobytes()


def folder(root: Path, **files: bytes) -> Path:
    """Two classes: good images, and the named files in the first one, in front of the others."""
    for label in 'ab':
        path = root / 'd' / 'train' / label
        path.mkdir(parents=True)
        for i in range(6):
            Image.fromarray(GRAY.astype(np.uint8)).convert('RGB').save(path / f'z{i}.png')
    for name, content in files.items():
        (root / 'd' / 'train' / 'a' / f'{name}.png').write_bytes(content)
    return root / 'd'


def png(array: np.ndarray, kind: str = 'PNG') -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def test_every_way_of_reading_images_scales_16_bits(tmp_path: Path) -> None:
    root = folder(tmp_path, a0=png((GRAY * 257).astype(np.uint16)))
    expected = torch.from_numpy(GRAY.astype(np.float32) / 255).expand(3, 32, 32)
    (x, _), *_ = load_batches(open_dataset('', str(root), 'train'), CONFIG, workers=0)
    torch.testing.assert_close(x[0], expected)
    cached = CachedLoader(open_dataset('', str(root), 'train'), CONFIG, batch_size=13, workers=0, augment=False)
    for x, _ in cached:
        torch.testing.assert_close(x, expected.expand(13, 3, 32, 32), rtol=0, atol=1e-6)


@pytest.mark.parametrize('workers', [0, 1])
def test_floats_and_32_bits_are_refused_by_name(tmp_path: Path, workers: int) -> None:
    for array, text in ((GRAY.astype(np.float32), 'floats'), (GRAY.astype(np.int32), '32-bit integers')):
        root = folder(tmp_path / text, a0=png(array, 'TIFF'))
        with pytest.raises(RunError, match=rf"^images can not be read: image '.*train/a/a0.png' .*{text}, whose range"):
            load_batches(open_dataset('', str(root), 'train'), CONFIG, workers=workers)


def test_corrupt_files_are_skipped_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = png(GRAY.astype(np.uint8))
    text = PngInfo()
    text.add_text('xmp', 'x' * 3_000_000, zip=True)
    large = io.BytesIO()
    Image.fromarray(GRAY.astype(np.uint8)).save(large, 'PNG', pnginfo=text)  # more than Pillow decompresses
    broken = dict(a0=b'', a1=b'no image', a2=good[:60], a3=good[: len(good) // 2], a4=large.getvalue())
    root = folder(tmp_path, **broken)
    with caplog.at_level(logging.WARNING):
        batches = load_batches(open_dataset('', str(root), 'train'), CONFIG, workers=0)
    assert sum(len(y) for _, y in batches) == 17
    for name in broken:
        assert f"train/a/{name}.png': " in caplog.text


def test_nothing_but_corrupt_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = folder(tmp_path)
    for path in root.glob('train/*/*.png'):
        path.write_bytes(b'no image')
    status, line = fails(capsys, ['train', '--model', 'mixpath_nano_supernet', '--data-dir', str(root), '-b', '2', '-j',
                                  '0', '--num-classes', '2', '--val-split', '', '--search-holdout', '0',
                                  '--output', str(tmp_path / 'out'), '--img-size', '32'])  # fmt: skip
    assert status == 1 and 'can not be decoded' in line and '.png' in line


@settings(derandomize=True, database=None, deadline=None, max_examples=150)
@given(st.integers(0, 400), st.integers(1, 255), st.integers(0, 400))
def test_a_damaged_file_is_read_or_skipped(position: int, change: int, cut: int) -> None:
    """Whatever a bit error or a cut does to a file, the data set gives an image."""
    good = png(GRAY.astype(np.uint8))
    damaged = bytearray(good)
    damaged[position % len(good)] ^= change
    files = [bytes(damaged), good[: cut % len(good)], good]

    class Files:
        def __getitem__(self, index: int):
            return io.BytesIO(files[index]), index

        def __len__(self) -> int:
            return len(files)

    dataset = open_dataset_of(Files())
    for index in range(3):
        image, _ = dataset[index]
        assert image.mode == 'RGB' and image.size[0] > 0


def open_dataset_of(reader) -> ImageFiles:
    from timm.data import ImageDataset

    return ImageFiles(ImageDataset('', reader=reader))


def test_iterate_names_the_cause_alone() -> None:
    def loader():
        yield 1
        raise RuntimeError('Caught in worker.\nTraceback:\n  File "x"\nfoo.bar.RunError: image 7 is broken')

    with pytest.raises(RunError, match=r'^images can not be read: image 7 is broken$'):
        list(iterate(loader()))
