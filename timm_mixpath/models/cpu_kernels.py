"""Faster gradients of large depthwise convolutions on a CPU, compiled on request.

The weight gradient of a depthwise convolution of 5x5 or more takes torch five to fifty times as long on a CPU as the
convolution, and is half of the backward pass of a supernet. `cpu_kernels.cpp` has another one, which takes the place
of torch's behind `aten::convolution_backward`, so that every model, autograd, torch.compile and DDP find it. Nothing
needs it, and nothing is compiled unless it is asked for.
"""

import hashlib
import logging
import os
import platform
import shutil
import sysconfig
import tempfile
from pathlib import Path

import torch

from ..utils.errors import RunError, concise

__all__ = ['cpu_kernel_calls', 'use_cpu_kernels']

_SOURCE = Path(__file__).with_name('cpu_kernels.cpp')
_loaded = False

_logger = logging.getLogger(__name__)


def use_cpu_kernels(on: bool = True) -> bool:
    """Compute the gradients of depthwise convolutions on the CPU with this package's kernel, or with torch's again.

    It is taken for the weight gradient of depthwise convolutions of 5x5 to 11x11 without dilation, in float32 and
    float64, whose input is channels-last; everything else remains torch's. Gradients are the same up to rounding, and
    the same for any number of threads. It holds for the whole process and for all models.

    The first time it is compiled with `torch.utils.cpp_extension`, which takes about 20 seconds, and kept in that
    module's folder (`TORCH_EXTENSIONS_DIR`), once per version of torch, source and kind of processor.

    Args:
        on: Whether to use it.

    Returns:
        Whether it was in use before.

    Raises:
        RunError: It can't be compiled (there is no C++ compiler, or no ninja) or loaded.
    """
    global _loaded
    if not _loaded:
        if not on:
            return False
        _load()
        _loaded = True
    return torch.ops.timm_mixpath.enable_cpu_kernels(on)


def cpu_kernel_calls() -> int:
    """Return how many gradients the kernel has computed in this process."""
    return torch.ops.timm_mixpath.cpu_kernel_calls() if _loaded else 0


def _load() -> None:
    from torch.utils import cpp_extension

    root = os.environ.get('TORCH_EXTENSIONS_DIR') or cpp_extension.get_default_build_root()
    library = Path(root) / f'timm_mixpath_{_fingerprint()}.so'
    if library.exists():
        try:
            torch.ops.load_library(str(library))
        except (OSError, RuntimeError) as e:
            raise RunError(
                f'the CPU kernels in {str(library)!r} can not be loaded, delete the file: {concise(e)}'
            ) from e
        return
    _logger.info('Compiling the CPU kernels, once')
    path = os.environ.get('PATH', '')
    os.environ['PATH'] = os.pathsep.join((path, sysconfig.get_path('scripts')))  # ninja of an environment not activated
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        # In a folder of its own, so that what a killed build leaves, or one beside this one, is in nobody's way
        with tempfile.TemporaryDirectory(dir=library.parent, prefix='timm_mixpath_') as folder:
            cpp_extension.load(
                library.stem,
                [str(_SOURCE)],
                extra_cflags=['-O3', '-march=native', '-fopenmp'],
                extra_ldflags=['-fopenmp'],
                build_directory=folder,
                is_python_module=False,
            )
            os.replace(next(Path(folder).glob('*.so')), library)
    except (OSError, RuntimeError) as e:
        missing = [tool for tool in (os.environ.get('CXX', 'c++'), 'ninja') if shutil.which(tool) is None]
        reason = f'there is no {" and no ".join(missing)}' if missing else concise(e)
        raise RunError(
            f'the CPU kernels can not be compiled: {reason}; they need a C++ compiler and ninja (pip install '
            "'timm-mixpath[cpu-kernels]'), and everything works without them, only slower"
        ) from e
    finally:
        os.environ['PATH'] = path


def _fingerprint() -> str:
    """A library is for one processor: what it was compiled for on another one may not run."""
    flags = platform.processor() + platform.machine()
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        flags = next(line for line in lines if line.startswith(('flags', 'Features')))
    except (OSError, StopIteration):
        pass
    parts = (torch.__version__, flags, _SOURCE.read_text())
    return hashlib.sha256('\n'.join(parts).encode()).hexdigest()[:16]
