"""A grid doubled, and a 3 x 3 convolution over it: both autoencoders' way to the next finer scale, as one product.

Of the nine cells that the kernel meets after each was doubled only four are different. So the kernel spread over its
2 x 2 doubles, a transposed convolution of stride 2 over the small grid, gives the same numbers for 4/9 of the
multiplications, and the large grid is never copied.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def doubled(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """conv, of 3 x 3 with a padding of 1, over the nearest-neighbour doubling of x: [B, C, H, W] -> [B, C', 2H, 2W]."""
    # a transposed kernel is met from the other side; both pads together give its 4 x 4 taps
    wide = F.pad(conv.weight.float().flip(2, 3), (1, 1, 1, 1))
    rows = wide[:, :, 1:] + wide[:, :, :-1]
    taps = (rows[..., 1:] + rows[..., :-1]).to(conv.weight.dtype)
    taps = taps.transpose(0, 1).contiguous()  # PyTorch on Metal has read other weights as if they were
    return F.conv_transpose2d(x, taps, conv.bias, stride=2, padding=1)
