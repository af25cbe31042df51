"""Start the autoencoder as the best linear one that its shape allows, so that training adds only what is not linear.

Residual branches start near zero, which leaves one linear path through either half. In the encoder, every halving keeps
the principal components of 2 x 2 cells; in the decoder, every doubling is a least-squares fit of the same coefficients
from the coarser ones. Through a norm and a SiLU, a signal passes as the pair (x, -x), since silu(x) - silu(-x) = x,
with constant channels that keep the norm's divisor nearly constant.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.vae import Decoder, Downsample, Encoder, QwenImageVAE, ResidualBlock, UpBlock, Upsample, norm_silu

CONSTANT = 6.0  # of the channels that steady a norm; signals are about 1


def principal_components(cells: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """cells [N, D] -> the `keep` strongest directions [keep, D], scaled to unit output, and the mean [D]."""
    mean = cells.mean(0)
    values, vectors = torch.linalg.eigh((cells - mean).T @ (cells - mean) / len(cells))
    order = values.argsort(descending=True)[:keep]
    return vectors[:, order].T, mean


def fit_conv(x: Tensor, y: Tensor, kernel: int, ridge: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Least squares for a convolution: x [B, C, H, W], y [B, O, H, W] -> weight [O, C, k, k], bias [O]."""
    rows = nn.functional.unfold(x, kernel, padding=kernel // 2).transpose(1, 2).flatten(0, 1)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    gram = rows.T @ rows / len(rows)
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    solution = torch.linalg.solve(gram, rows.T @ y.permute(0, 2, 3, 1).flatten(0, 2) / len(rows)).T
    return solution[:, :-1].reshape(-1, x.shape[1], kernel, kernel), solution[:, -1]


def set_conv(conv: nn.Module, weight: Tensor, bias: Tensor | float = 0.0) -> nn.Conv2d:
    """Put a small kernel into the corner that the convolution reads first; set all its other weights to zero."""
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    conv.weight.zero_()
    conv.bias.zero_()
    o, i, k, _ = weight.shape
    at = conv.kernel_size[0] // 2 if k == 1 else 0
    conv.weight[:o, :i, at : at + k, at : at + k] = weight
    conv.bias[:o] = bias
    return conv


def set_conv_pair(conv: nn.Module, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """Make a convolution output (x, -x, constants) instead of x."""
    conv = set_conv(conv, torch.cat([weight, -weight]), torch.cat([bias, -bias]))
    assert conv.bias is not None
    conv.bias[2 * len(weight) :] = CONSTANT
    return conv


def set_identity(conv: nn.Module, channels: int) -> nn.Conv2d:
    """Make a convolution pass on its first channels as is; the rest of its output is zero."""
    assert isinstance(conv, nn.Conv2d)
    return set_conv(conv, torch.eye(channels)[: conv.out_channels, : conv.in_channels, None, None])


@torch.no_grad()
def init_linear(vae: QwenImageVAE, images: Tensor) -> None:
    """images [B, 3, H, W] in -1 ... 1, a few dozen -> the weights of `vae`, in place."""
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is not None
            branch = name.endswith((".conv2", ".proj"))
            nn.init.normal_(module.weight, std=(0.02 if branch else 1.0) / module.weight[0].numel() ** 0.5)
            nn.init.zeros_(module.bias)
    z_dim = vae.config.z_dim
    levels = init_encoder(vae.encoder, z_dim, images)
    moments = set_identity(vae.quant_conv, z_dim)
    assert moments.bias is not None
    moments.bias[z_dim:] = -5.0  # the variance, which starts small
    set_identity(vae.post_quant_conv, z_dim)
    init_decoder(vae.decoder, vae.moments(images)[0], levels)


def init_encoder(encoder: Encoder, z_dim: int, images: Tensor) -> list[Tensor]:
    """-> the coefficients at every scale, starting with the pictures themselves."""
    set_identity(encoder.conv_in, 3)
    x, levels, shortcut = images, [images], None
    for layer in encoder.down_blocks:
        if isinstance(layer, ResidualBlock) and isinstance(layer.conv_shortcut, nn.Conv2d):
            shortcut = set_identity(layer.conv_shortcut, x.shape[1])
        elif isinstance(layer, Downsample):
            cells = nn.functional.unfold(x, 2, stride=2).transpose(1, 2).flatten(0, 1)
            keep = min(channels_out(layer), cells.shape[1])
            directions, mean = principal_components(cells, keep)
            weight = directions.view(keep, x.shape[1], 2, 2) / 2  # averages: colours keep their size
            bias = -(weight.flatten(1) @ mean)
            set_conv(layer.resample[1], weight, bias)
            x = nn.functional.conv2d(x, weight, bias, stride=2)
            levels.append(x)
    assert shortcut is not None and shortcut.out_channels > 2 * z_dim
    coefficients = x.transpose(0, 1).flatten(1).T
    directions, mean = principal_components(coefficients, z_dim)
    deviation = ((coefficients - mean) @ directions.T).std(0).clamp_min(1e-3)
    directions = directions / deviation[:, None]
    weight, bias = directions[..., None, None], -(directions @ mean)
    set_conv_pair(shortcut, weight, bias)
    wide = nn.functional.pad(x, (0, 0, 0, 0, 0, shortcut.in_channels - x.shape[1]))
    features = norm_silu(shortcut(wide), encoder.norm_out.gamma)
    set_conv(encoder.conv_out, *fit_conv(features, nn.functional.conv2d(x, weight, bias), 1))
    return levels


def init_decoder(decoder: Decoder, z: Tensor, levels: list[Tensor]) -> None:
    """Fit every step to the encoder's coefficients at that scale, from the previous step's output."""
    z_dim = z.shape[1]
    conv = set_identity(decoder.conv_in, z_dim)
    for k, (row, column) in enumerate(((0, 1), (2, 1), (1, 0), (1, 2))):  # neighbours, for smoother interpolation
        channels = torch.arange(z_dim * (k + 1), min(z_dim * (k + 2), conv.out_channels))
        conv.weight[channels, torch.arange(len(channels)), row, column] = 1
    x = conv(z)
    for block, target in zip(decoder.up_blocks, [*levels[-2::-1], None], strict=True):
        assert isinstance(block, UpBlock)
        for resnet in block.resnets:
            assert isinstance(resnet, ResidualBlock)
            if isinstance(resnet.conv_shortcut, nn.Conv2d):
                x = set_identity(resnet.conv_shortcut, x.shape[1])(x)
        for layer in block.upsamplers:
            assert isinstance(layer, Upsample) and target is not None
            wide = layer.resample[0](x)
            x = (set_conv if target is not levels[0] else set_conv_pair)(layer.resample[1], *fit_conv(wide, target, 3))(
                wide
            )
    set_conv(decoder.conv_out, *fit_conv(norm_silu(x, decoder.norm_out.gamma), levels[0], 3))


def channels_out(layer: Downsample) -> int:
    """The number of output channels of a downsampling step."""
    conv = layer.resample[1]
    assert isinstance(conv, nn.Conv2d)
    return conv.out_channels
