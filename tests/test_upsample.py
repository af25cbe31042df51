"""Upsampling to the next finer scale as a single product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.upsample import upsample_conv


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fused_product_equals_upsampling_and_convolution(monkeypatch, layout):
    x, conv = torch.randn(2, 6, 5, 7), nn.Conv2d(6, 4, 3, padding=1).to(memory_format=layout)
    taps, product = [], F.conv_transpose2d

    def seen(x: torch.Tensor, weight: torch.Tensor, *others, **named) -> torch.Tensor:
        taps.append(weight)
        return product(x, weight, *others, **named)

    monkeypatch.setattr(F, "conv_transpose2d", seen)

    answer = upsample_conv(x, conv)

    torch.testing.assert_close(answer, conv(F.interpolate(x, scale_factor=2)), rtol=1e-4, atol=1e-5)
    assert taps[0].is_contiguous()
