"""The search: which archs of a trained supernet are the best trade-offs of accuracy and cost."""

from .config import SearchConfig
from .images import SearchData
from .run import search, search_checkpoint

__all__ = ['SearchConfig', 'SearchData', 'search', 'search_checkpoint']
