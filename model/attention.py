"""Attention by the kernel that a device has, in the way that the kernel likes best.

B rows, H query heads, K key-value heads, S queries, S' keys, d head dim.
"""

from __future__ import annotations

from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor

# Metal's kernel holds every score; from 2^31 of them on, as four pictures of 1024 pixels have, its answers are wrong
# without a word. These take less than what a feed-forward holds of such a picture, which plans count.
SCORES_AT_ONCE = {"mps": 1 << 27}


def repeated(x: Tensor, heads: int) -> Tensor:
    """Key-value heads x [B, K, S, d] -> [B, H, S, d], one for each query head: the first H / K share the first."""
    return x.repeat_interleave(heads // x.shape[1], 1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q [B, H, S, d], k and v [B, K, S', d], mask broadcast to [B, H, S, S'] -> [B, H, S, d]."""
    most = SCORES_AT_ONCE.get(q.device.type)
    if most and q.shape[2] > (at_once := max(1, most // (q.shape[:2].numel() * k.shape[2]))):
        masks = repeat(mask) if mask is None or mask.shape[-2] == 1 else mask.split(at_once, -2)
        return torch.cat([attention(some, k, v, own) for some, own in zip(q.split(at_once, 2), masks, strict=False)], 2)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # whose kernel walks over heads: every stride costs it
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if q.device.type == "cuda" and (mask is not None or q.dtype == torch.float32):
        # the fused kernel there that takes these knows no shared heads: all logits would be held, in fp32
        k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
