"""What mixed precision makes of a forward pass."""

import pytest
import torch

from timm_mixpath.utils.precision import AMP_DTYPES, autocast_context


@pytest.mark.parametrize('amp_dtype', [None, *AMP_DTYPES])
def test_products_have_its_dtype_and_sums_have_not(amp_dtype: str | None) -> None:
    make_context, x = autocast_context('cpu', amp_dtype), torch.ones(2, 2)
    for _ in range(2):  # one context per pass
        with make_context():
            assert (x @ x).dtype == (torch.float32 if amp_dtype is None else getattr(torch, amp_dtype))
            assert (x + x).dtype == torch.float32
