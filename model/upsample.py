"""Doubling a grid and a 3 x 3 convolution over it, fused: both autoencoders' step to the next finer scale.

After doubling, the nine cells under the kernel hold only four different values. So a transposed convolution of stride 2
over the small grid, with the kernel spread over the 2 x 2 duplicates, gives the same numbers for 4/9 of the
multiplications, and the large grid is never built.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def upsample_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """conv, 3 x 3 with padding 1, over the nearest-neighbour doubling of x: [B, C, H, W] -> [B, C', 2H, 2W]."""
    # a transposed convolution flips its kernel; the two shifted sums give its 4 x 4 taps
    wide = F.pad(conv.weight.float().flip(2, 3), (1, 1, 1, 1))
    rows = wide[:, :, 1:] + wide[:, :, :-1]
    taps = (rows[..., 1:] + rows[..., :-1]).to(conv.weight.dtype)
    taps = taps.transpose(0, 1).contiguous()  # PyTorch on Metal misreads non-contiguous weights
    return F.conv_transpose2d(x, taps, conv.bias, stride=2, padding=1)
