"""Attention with each device's own kernel, and inputs laid out as that kernel likes them.

B rows, H query heads, K key-value heads, S queries, S' keys, d head dim.
"""

from __future__ import annotations

from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor

# Metal's kernel materialises all scores; from 2^31 of them on (four pictures of 1024 px) its results are silently
# wrong. This many take less memory than the feed-forward of such a picture, which plans allow for.
MAX_SCORES = {"mps": 1 << 27}


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat key-value heads x [B, K, S, d] -> [B, H, S, d], one per query head: the first H / K share the first."""
    return x.repeat_interleave(heads // x.shape[1], 1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q [B, H, S, d], k and v [B, K, S', d], mask broadcast to [B, H, S, S'] -> [B, H, S, d]."""
    max_scores = MAX_SCORES.get(q.device.type)
    if max_scores and q.shape[2] > (chunk := max(1, max_scores // (q.shape[:2].numel() * k.shape[2]))):
        masks = repeat(mask) if mask is None or mask.shape[-2] == 1 else mask.split(chunk, -2)
        return torch.cat(
            [attention(some, k, v, part_mask) for some, part_mask in zip(q.split(chunk, 2), masks, strict=False)], 2
        )
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # its kernel iterates over heads: strides slow it
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if q.device.type == "cuda" and (mask is not None or q.dtype == torch.float32):
        # the fused kernel for these cannot share heads; the fallback would hold all logits, in fp32
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
