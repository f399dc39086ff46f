"""Training of supernets and networks."""

from .loop import TrainResult, train
from .options import default_args

__all__ = ['TrainResult', 'default_args', 'train']
