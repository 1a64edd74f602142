"""Multi-head attention over [image][source][target], steered by the mask alone.

Shape suffixes: B rows, N positions of a row, T packed positions, Q queries, K keys, D hidden size, H heads, A = B H,
d head size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cache import LayerCache
from model.config import MOST_SCORES, ModelConfig
from model.grouped import multiplied_in_fp32
from model.initialise import Linear
from model.packing import Packing


def attention_mask(source_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """Who sees whom, [B, 1, N, N] bool (M6, arXiv 2103.00823: a bidirectional and an autoregressive region).

    A source position sees all of the source; a target position sees all of the source and the targets up to
    itself. Padding is seen by nobody; it sees itself, so that no softmax is empty.
    """
    n = source_BN.shape[1]
    causal_NN = torch.ones(n, n, dtype=torch.bool, device=source_BN.device).tril()
    target_B1Q1 = (valid_BN & ~source_BN)[:, None, :, None]
    source_B11K = (source_BN & valid_BN)[:, None, None, :]
    own_B1QK = target_B1Q1 & causal_NN & (valid_BN & ~source_BN)[:, None, None, :]
    seen_B1QK = (source_B11K & valid_BN[:, None, :, None]) | own_B1QK
    return seen_B1QK | torch.eye(n, dtype=torch.bool, device=source_BN.device)


def attend(q_BHNd: Tensor, k_BHNd: Tensor, v_BHNd: Tensor, mask_B1NN: Tensor) -> Tensor:
    """What each position takes from those that it sees, [B, H, N, d].

    In training on CPUs short rows go through plain products: the backward pass of torch's own kernel takes several
    times as long in bf16 (docs/LOG.md, 51).
    """
    b, h, n, d = q_BHNd.shape
    if not _learns_by_products(q_BHNd) or b * h * n * n > MOST_SCORES:
        return F.scaled_dot_product_attention(q_BHNd, k_BHNd, v_BHNd, attn_mask=mask_B1NN)
    hidden_B1NN = q_BHNd.new_zeros(mask_B1NN.shape).masked_fill(~mask_B1NN, -math.inf)
    q_ANd, k_ANd, v_ANd = (x_BHNd.flatten(0, 1) for x_BHNd in (q_BHNd, k_BHNd, v_BHNd))
    scores_ANN = torch.baddbmm(
        hidden_B1NN.expand(b, h, n, n).flatten(0, 1), q_ANd, k_ANd.transpose(1, 2), alpha=d**-0.5
    )
    return torch.bmm(scores_ANN.softmax(-1), v_ANd).unflatten(0, (b, h))


def _learns_by_products(x: Tensor) -> bool:
    emulated = x.dtype.itemsize < 4 and multiplied_in_fp32(x)
    return x.device.type == "cpu" and torch.is_grad_enabled() and not emulated


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, *key: object):
        super().__init__()
        self.heads = config.heads
        rank = config.adapter_rank
        self.qkv = Linear(config.hidden, 3 * config.hidden, config.init_std, *key, "qkv", adapter_rank=rank)
        self.out = Linear(config.hidden, config.hidden, config.init_std, *key, "out", adapter_rank=rank)

    def forward(self, x_TD: Tensor, mask_B1NN: Tensor, packing: Packing, cache: LayerCache | None = None) -> Tensor:
        """[T, D] -> [T, D]: packed but for the attention itself, whose rows have one length.

        With a cache, which must be empty, the keys and values go into it.
        """
        qkv_BN3Hd = packing.unpack(self.qkv(x_TD)).unflatten(-1, (3, self.heads, -1))
        qkv_3BHNd = qkv_BN3Hd.permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache.append(qkv_3BHNd[1:])
        q_BHNd, k_BHNd, v_BHNd = qkv_3BHNd.unbind(0)
        y_BHNd = attend(q_BHNd, k_BHNd, v_BHNd, mask_B1NN)
        return self.out(packing.pack(y_BHNd.transpose(1, 2).flatten(2)))

    def extend(self, x_BD: Tensor, mask_B11K: Tensor, cache: LayerCache) -> Tensor:
        """One more position of each row, [B, D] -> [B, D], which sees what is in the cache and itself."""
        qkv_3BH1d = self.qkv(x_BD).unflatten(-1, (3, self.heads, 1, -1)).transpose(0, 1)
        k_BHKd, v_BHKd = cache.append(qkv_3BH1d[1:])
        y_BH1d = F.scaled_dot_product_attention(qkv_3BH1d[0], k_BHKd, v_BHKd, attn_mask=mask_B11K)
        return self.out(y_BH1d.flatten(1))
