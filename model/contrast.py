"""Pictures and texts in one space: each is to find its partner among the others of its group (InfoNCE).

As in CLIP (Radford et al. 2021, arXiv 2103.00020, section 2.3), with the temperature fixed.

Shape suffixes: B rows, I image rows, S text rows (as many), D hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.1
WORTH = 8  # tokens to say: what finding one partner weighs in a batch's loss


def embed(x: Tensor) -> Tensor:
    """Hidden states [..., D] -> fp32 vectors of length one, whose products are cosines."""
    return F.normalize(x.float(), dim=-1)


def sides(image_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows are image rows of a group, and which text rows, each [B] bool."""
    return (group_B >= 0) & image_B, (group_B >= 0) & ~image_B


def contrastive_loss(x_BD: Tensor, image_B: Tensor, group_B: Tensor, concept_B: Tensor) -> Tensor:
    """`finding_loss` by the cosines of vectors."""
    own_B, text_B = sides(image_B, group_B)
    return finding_loss(embed(x_BD[own_B]) @ embed(x_BD[text_B]).T / TEMPERATURE, image_B, group_B, concept_B)


def finding_loss(logits_IS: Tensor, image_B: Tensor, group_B: Tensor, concept_B: Tensor) -> Tensor:
    """Cross entropy [B] fp32 of finding each row's partner, the k-th text row's being the k-th image row.

    group_B: rows compete within a group; -1 for rows that take no part, whose loss is 0. concept_B: rows of one concept
    do not compete.
    """
    image_B, text_B = sides(image_B, group_B)
    apart_IS = group_B[image_B][:, None] != group_B[text_B]
    alike_IS = concept_B[image_B][:, None] == concept_B[text_B]
    others_IS = ~torch.eye(len(logits_IS), dtype=torch.bool, device=logits_IS.device)
    logits_IS = logits_IS.masked_fill(apart_IS | (alike_IS & others_IS), -torch.inf)
    partner_I = torch.arange(len(logits_IS), device=logits_IS.device)
    loss_B = logits_IS.new_zeros(len(group_B))
    for rows_B, logits in ((image_B, logits_IS), (text_B, logits_IS.T)):
        loss_B = loss_B.masked_scatter(rows_B, F.cross_entropy(logits, partner_I, reduction="none"))
    return loss_B
