"""Pictures and texts as bags: what they are found by beside the trunk's reading of them.

From a few thousand captioned pictures, a transformer learns by heart which are which before it learns what makes them
so. Sums generalise further: a picture is a linear map of its mean patch, a text the sum of its pieces' vectors (Joulin
et al. 2016, arXiv 1607.01759, classify by such sums), and a picture's sum foretells the pieces of its words. By a map
of its own, a picture also has the words that it is asked for by, to be found by texts whose side is not learned.

Shape suffixes: B rows, T text positions, P image patches, C channels of a patch, S width of a sum, V text pieces, W
pieces of a row's words.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.initialise import Linear, Vocabulary

ABSENT = -100  # stands in words_BW where a row has fewer
ASKED_TEMPERATURE = 0.05


class Bags(nn.Module):
    """Maps and tables of their own: no weight is shared with the trunk."""

    def __init__(self, config: ModelConfig, *key: object):
        super().__init__()
        self.vocab = config.text_vocab
        vocab, channels, rank = config.text_vocab, config.image_channels, config.adapter_rank
        width, std = config.bag_width, config.init_std
        self.image = Linear(channels, width, std, *key, "bag of patches", adapter_rank=rank)
        self.words = Vocabulary(vocab, width, std, *key, "bag of pieces", adapter_rank=rank)
        self.asked_image = Linear(channels, width, std, *key, "asked of patches", adapter_rank=rank)
        self.asked_words = Vocabulary(vocab, width, std, *key, "asked of pieces", adapter_rank=rank)

    def forward(self, tokens_BT: Tensor, source_B: Tensor, image_BPC: Tensor, has_image_B: Tensor) -> Tensor:
        """[B, S]: of each row's picture, or of its source if it has none. Image codes count for nothing."""
        place_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        within_BT = (place_T < source_B[:, None]) & (tokens_BT < self.vocab)
        pieces_BTS = self.words(tokens_BT.clamp(max=self.vocab - 1))
        text_BS = (pieces_BTS * within_BT[..., None]).sum(1)
        image_BS = self.image(image_BPC.to(text_BS.dtype).mean(1))
        return torch.where(has_image_B[:, None], image_BS, text_BS)

    def likely_words(self, x_BS: Tensor) -> Tensor:
        """Logarithms of probabilities [B, V], fp32: which pieces a sum foretells."""
        return self.words(x_BS).float().log_softmax(-1)

    def asked_for(self, image_BPC: Tensor) -> Tensor:
        """Which pieces pictures are asked for by: [B, V] fp32, rows of length 1, of either sign."""
        mean_BC = image_BPC.to(self.asked_image.weight.dtype).mean(1)
        return F.normalize(self.asked_words(self.asked_image(mean_BC)).float(), dim=-1)

    def called_for(self, x_BS: Tensor) -> Tensor:
        """Which pieces pictures of these sums call for more than an average one does: [B, V], rows of length 1.

        By what square roots of probabilities exceed those of a picture without features: these are standardised.
        """
        roots_BV, average_1V = ((logs / 2).exp() for logs in (self.likely_words(x_BS), self._usual_words(x_BS)))
        return F.normalize((roots_BV - average_1V).clamp_min(0), dim=-1)

    def gains(self, x_BS: Tensor) -> Tensor:
        """By how many nats pieces are likelier than for an average picture, [B, V]; 0 where they are not."""
        return (self.likely_words(x_BS) - self._usual_words(x_BS)).clamp_min(0)

    def _usual_words(self, like: Tensor) -> Tensor:
        """`likely_words` of an average picture, [1, V]."""
        return self.likely_words(self.image(like.new_zeros(1, self.image.in_features)))


def words_loss(logs_BV: Tensor, words_BW: Tensor) -> Tensor:
    """What the pieces of each row's words cost on average, [B] (nats); 0 for a row without."""
    known_BW = words_BW != ABSENT
    log_BW = logs_BV.gather(1, words_BW.clamp(min=0)).masked_fill(~known_BW, 0)
    return -log_BW.sum(1) / known_BW.sum(1).clamp(min=1)


def spread_words(words_BW: Tensor, weights_BW: Tensor, vocab: int) -> Tensor:
    """Each row's pieces as a vector of their weights, [B, V] fp32."""
    spread_BV = weights_BW.new_zeros(len(words_BW), vocab, dtype=torch.float32)
    return spread_BV.scatter_add(1, words_BW.clamp(min=0), weights_BW.float() * (words_BW != ABSENT))
