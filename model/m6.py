"""M6: one transformer over `[image patches][source text][target]` (M6, arXiv 2103.00823).

The attention mask alone decides the task: a source position sees all of the source, a target position sees all
of the source and the targets up to itself; the loss is on the targets, and where the source has masks. Image codes are
further vocabulary entries, so drawing is writing, and repairing a picture is filling in its masked codes.

Shape suffixes: B rows, T text positions, P image patches, N = P + T, R packed positions, D hidden size, C channels of
a patch, S positions with a label, V vocabulary, K columns of a cache, L layers, M modalities, E experts.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import Attention, attention_mask
from model.bags import ASKED_TEMPERATURE, Bags, spread_words, words_loss
from model.cache import Cache, LayerCache
from model.config import ModelConfig
from model.contrast import WORTH, contrastive_loss, finding_loss, sides
from model.experts import ExpertParallel
from model.grouped import activate, few_sizes
from model.initialise import Linear, Table, Vocabulary
from model.moe import MoELayer
from model.packing import Packing
from model.vision import PatchEmbedding

IGNORE = -100  # label of a position without loss
IMAGE, SOURCE, TARGET = range(3)  # segments


class FeedForward(nn.Module):
    """The dense feed-forward layer: two matrices with bias, GELU."""

    def __init__(self, config: ModelConfig, *key: object):
        super().__init__()
        self.gated = config.gated_experts
        inner, rank = config.ffn * (2 if self.gated else 1), config.adapter_rank
        self.inner = Linear(config.hidden, inner, config.init_std, *key, "inner", adapter_rank=rank)
        self.outer = Linear(config.ffn, config.hidden, config.init_std, *key, "outer", adapter_rank=rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(activate(self.inner(x), self.gated))


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, dense or of experts."""

    def __init__(self, config: ModelConfig, parallel: ExpertParallel, *key: object):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden)
        self.attention = Attention(config, *key)
        self.feed_forward_norm = nn.LayerNorm(config.hidden)
        if config.experts:
            self.moe = MoELayer(config, parallel, *key)
        else:
            self.feed_forward = FeedForward(config, *key)
        self.sparse = config.experts > 0

    def forward(
        self, x_RD: Tensor, mask_B1NN: Tensor, image_R: Tensor, packing: Packing, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [R, D], auxiliary loss, routing counts [M, 2, E]."""
        x_RD = x_RD + self.attention(self.attention_norm(x_RD), mask_B1NN, packing, cache)
        normed_RD = self.feed_forward_norm(x_RD)
        if not self.sparse:
            no_counts = image_R.new_zeros(2, 2, 0, dtype=torch.int64)
            return x_RD + self.feed_forward(normed_RD), x_RD.new_zeros(()), no_counts
        y_RD, auxiliary, counts = self.moe(normed_RD, packing.valid_T, image_R)
        return x_RD + y_RD, auxiliary, counts

    def extend(self, x_BD: Tensor, mask_B11K: Tensor, cache: LayerCache) -> Tensor:
        """Hidden states [B, D] of one more position of each row; nothing is dropped or counted."""
        x_BD = x_BD + self.attention.extend(self.attention_norm(x_BD), mask_B11K, cache)
        normed_BD = self.feed_forward_norm(x_BD)
        return x_BD + (self.moe.extend(normed_BD) if self.sparse else self.feed_forward(normed_BD))


class M6(nn.Module):
    """The model. `seed` alone decides its first weights; `parallel` says which experts live here."""

    def __init__(self, config: ModelConfig, seed: int = 0, parallel: ExpertParallel | None = None):
        super().__init__()
        self.config = config
        self.recompute = False  # activation checkpointing
        parallel = parallel or ExpertParallel()
        # The one table of text pieces and image codes.
        self.vocabulary = Vocabulary(config.vocab, config.hidden, config.init_std, seed, "vocabulary")
        self.position = Table(config.max_positions, config.hidden, config.init_std, seed, "position")
        self.segment = Table(3, config.hidden, config.init_std, seed, "segment")
        self.image = PatchEmbedding(config, seed)
        physical = 1 if config.share_layers else config.layers
        self.layers = nn.ModuleList(Layer(config, parallel, seed, number) for number in range(physical))
        self.norm = nn.LayerNorm(config.hidden)
        self.bags = Bags(config, seed) if config.bag_width else None

    def hidden_states(
        self, tokens_BT: Tensor, source_B: Tensor, length_B: Tensor, image_BPC: Tensor, has_image_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The trunk: hidden states [B, N, D] (padding zero), auxiliary loss, routing counts [L, M, 2, E], valid [B, N].

        tokens_BT: text ids, source then target, padded; source_B: source positions of each row; length_B: text
        positions of each row; image_BPC: patch features, of any finite value where has_image_B is False.
        """
        x_BND, image_BN, source_BN, valid_BN = self._embed(tokens_BT, source_B, length_B, image_BPC, has_image_B)
        return *self._run_layers(x_BND, attention_mask(source_BN, valid_BN), image_BN, valid_BN), valid_BN

    def _embed(
        self, tokens_BT: Tensor, source_B: Tensor, length_B: Tensor, image_BPC: Tensor, has_image_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What goes into the first layer [B, N, D], and image, source and valid positions, each [B, N] bool."""
        place_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        source_BT = place_T < source_B[:, None]
        segment_BT = torch.where(source_BT, SOURCE, TARGET)
        text_BTD = self.vocabulary(tokens_BT) + self.position(place_T) + self.segment(segment_BT)
        # Rows without a picture run the image path too: every rank must run the same modules (ZeRO-3).
        image_BPD = self.image(image_BPC.to(text_BTD.dtype))
        image_BPD = image_BPD + self.segment(torch.full_like(place_T[:1], IMAGE))
        x_BND = torch.cat((image_BPD, text_BTD), 1)
        return x_BND, *self._regions(source_BT, place_T < length_B[:, None], has_image_B)

    def _run_layers(
        self, x_BND: Tensor, mask_B1NN: Tensor, image_BN: Tensor, valid_BN: Tensor, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [B, N, D] (padding zero), auxiliary loss, routing counts; all keys and values into a cache."""
        packing = Packing.of(valid_BN, like=x_BND)
        x_RD, image_R = packing.pack(x_BND), packing.pack_flags(image_BN)
        auxiliary, counts = x_RD.new_zeros((), dtype=torch.float32), []
        for number in range(self.config.layers):
            layer_cache = None if cache is None else cache.layer(number)
            x_RD, extra, count = self._call_layer(number, x_RD, mask_B1NN, image_R, packing, layer_cache)
            auxiliary = auxiliary + extra
            counts.append(count)
        return packing.unpack(self.norm(x_RD)), auxiliary, torch.stack(counts)

    def _regions(self, source_BT: Tensor, text_BT: Tensor, has_image_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image, source and valid positions, each [B, N] bool."""
        has_BP = has_image_B[:, None].expand(-1, self.config.image_patches)
        nowhere_BP = torch.zeros_like(has_BP)
        image_BN = torch.cat((~nowhere_BP, torch.zeros_like(text_BT)), 1)
        return image_BN, torch.cat((has_BP, source_BT), 1), torch.cat((has_BP, text_BT), 1)

    def _call_layer(self, number: int, *inputs: Tensor | Packing | LayerCache | None) -> tuple[Tensor, Tensor, Tensor]:
        layer = self._layer(number)
        if self.recompute and torch.is_grad_enabled():
            # Not reentrant: with a shared layer the reentrant form keeps only one use's gradient under ZeRO-3.
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def _layer(self, number: int) -> Layer:
        return cast(Layer, self.layers[0 if self.config.share_layers else number])

    def logits(self, x: Tensor, entries: range | None = None) -> Tensor:
        """Hidden states [..., D] -> logits [..., V] over text pieces, then image codes; or over `entries` alone."""
        return self.vocabulary(x, entries)

    @torch.no_grad()
    def prefill(self, batch: dict[str, Tensor], room: int, entries: range | None = None) -> tuple[Tensor, Cache]:
        """Read a batch (see `hidden_states`): logits [B, V] of what follows each row, fp32, and what `extend` needs.

        In evaluation alone: a model in training may drop tokens, which `extend` never does.
        `room`: tokens that each row can be extended by; `entries`: those of the vocabulary whose logits are wanted.
        Raises ValueError where a row would grow longer than the model's positions.
        """
        assert not self.training
        longest, most = int(batch["length_B"].max()), self.config.max_positions
        if longest + room > most:
            raise ValueError(f"a row of {longest} text positions has no room for {room} more: the model has {most}")
        x_BND, image_BN, source_BN, valid_BN = self._embed(
            batch["tokens_BT"], batch["source_B"], batch["length_B"], batch["image_BPC"], batch["has_image_B"]
        )
        cache = Cache.empty(self.config, valid_BN, batch["length_B"], room, x_BND.dtype)
        x_BND, *_ = self._run_layers(x_BND, attention_mask(source_BN, valid_BN), image_BN, valid_BN, cache)
        cache.filled = cache.prompt
        x_BD = last_positions(x_BND[:, self.config.image_patches :], batch["length_B"])
        return self.logits(x_BD, entries).float(), cache

    def summaries(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """What `model.contrast` compares: hidden states [B, D] of each row's last text position; bags [B, S] if any."""
        x_BND, *_ = self.hidden_states(
            batch["tokens_BT"], batch["source_B"], batch["length_B"], batch["image_BPC"], batch["has_image_B"]
        )
        summary_BD = last_positions(x_BND[:, self.config.image_patches :], batch["length_B"])
        if self.bags is None:
            return summary_BD, None
        own = batch["tokens_BT"], batch["source_B"], batch["image_BPC"], batch["has_image_B"]
        return summary_BD, self.bags(*own)

    @torch.no_grad()
    def extend(self, token_B: Tensor, cache: Cache, entries: range | None = None) -> Tensor:
        """Read one more target token of each row, into the cache: logits [B, V] of what follows it, fp32.

        Raises ValueError where the cache has no room for it.
        """
        mask_B11K = cache.next_mask()
        x_BD = self.vocabulary(token_B) + self.position(cache.length_B) + self.segment(torch.full_like(token_B, TARGET))
        for number in range(self.config.layers):
            x_BD = self._layer(number).extend(x_BD, mask_B11K, cache.layer(number))
        cache.filled += 1
        cache.length_B += 1
        return self.logits(self.norm(x_BD), entries).float()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch (see `hidden_states` for its inputs, and labels_BT: the id to predict, or IGNORE).

        With labels_BT: loss_B, the summed cross entropy of each row's labels (nats, fp32); targets_B, their number;
        rows with a contrastive group (group_B, concept_B; see `model.contrast`) have their partner to find, as WORTH
        targets; if there are bags, those of them with a picture have its words to foretell (words_BW, see
        `model.bags`), and are to be found by the words that are a text's own (words_BW, and weights_BW: of length 1);
        auxiliary, balance and z-loss summed over tokens; counts, routing counts [L, M, 2, E]; tokens, the number of
        valid positions. Without: logits_BV, of what follows each row's last text position.
        """
        x_BND, auxiliary, counts, valid_BN = self.hidden_states(
            batch["tokens_BT"], batch["source_B"], batch["length_B"], batch["image_BPC"], batch["has_image_B"]
        )
        x_BTD = x_BND[:, self.config.image_patches :]
        if "labels_BT" not in batch:
            return {"logits_BV": self.logits(last_positions(x_BTD, batch["length_B"])).float()}
        labels_BT = batch["labels_BT"]
        chosen_BT = labels_BT != IGNORE
        loss_S = self._cross_entropy(x_BTD[chosen_BT], labels_BT[chosen_BT])
        # Not index_add, whose order of additions is not fixed on GPUs.
        loss_B = loss_S.new_zeros(chosen_BT.shape).masked_scatter(chosen_BT, loss_S).sum(1)
        if "group_B" in batch:
            loss_B = loss_B + WORTH * self._finding_loss(last_positions(x_BTD, batch["length_B"]), batch)
        return {
            "loss_B": loss_B,
            "targets_B": target_counts(batch),
            "auxiliary": auxiliary,
            "counts": counts,
            "tokens": valid_BN.sum(),
        }

    def _finding_loss(self, summary_BD: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """What it costs each row of a contrastive group to find its partner, [B]: by the trunk, and by bags.

        Each part has a loss of its own, since together the one that learns by heart would leave the others nothing.
        """
        group = batch["has_image_B"], batch["group_B"], batch["concept_B"]
        loss_B = contrastive_loss(summary_BD, *group)
        if self.bags is None:
            return loss_B
        x_BS = self.bags(batch["tokens_BT"], batch["source_B"], batch["image_BPC"], batch["has_image_B"])
        image_B, text_B = sides(batch["has_image_B"], batch["group_B"])
        words_BW = batch["words_BW"]
        said = words_loss(self.bags.likely_words(x_BS[image_B]), words_BW[image_B])
        said_B = loss_B.new_zeros(len(loss_B)).masked_scatter(image_B, said)
        words_SV = spread_words(words_BW[text_B], batch["weights_BW"][text_B], self.config.text_vocab)
        asked_IS = self.bags.asked_for(batch["image_BPC"][image_B]) @ words_SV.T
        asked_B = finding_loss(asked_IS / ASKED_TEMPERATURE, *group)
        return loss_B + contrastive_loss(x_BS, *group) + said_B + asked_B

    def _cross_entropy(self, x_SD: Tensor, label_S: Tensor) -> Tensor:
        """Cross entropy of each target [S], in fp32."""
        short = few_sizes(max(len(x_SD), 1), x_SD) - len(x_SD)
        logits_SV = self.logits(F.pad(x_SD, (0, 0, 0, short))).float()
        return F.cross_entropy(logits_SV, F.pad(label_S, (0, short)), reduction="none")[: len(x_SD)]


def last_positions(x_BTD: Tensor, length_B: Tensor) -> Tensor:
    """Each row's last text position, [B, D]."""
    return x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), length_B - 1]


def target_counts(batch: dict[str, Tensor]) -> Tensor:
    """How many each row of a batch has to predict, [B]: tokens, or its partner (WORTH)."""
    counts_B = (batch["labels_BT"] != IGNORE).sum(1)
    return counts_B + WORTH * (batch["group_B"] >= 0) if "group_B" in batch else counts_B
