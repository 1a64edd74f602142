"""SentencePiece unigram tokenizer (Kudo 2018) with byte fallback: any text comes back unchanged."""

import hashlib
import io
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from training.errors import UserError

VOCAB_SIZE = 16_000
PAD_ID, UNK_ID, BOS_ID, EOS_ID, MASK_ID, EMBED_ID = range(6)
RESERVED = 27
SPECIAL_IDS = 5 + RESERVED
# The trained pieces depend on how many threads share the counting; two are what every machine has.
_THREADS = 2
_COVERAGE = 0.9995
_PARTS = re.compile("[\u3400-\u9fff]|[^\u3400-\u9fff]+")


def train_tokenizer(lines: Iterable[str], path: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Train on `lines` (without newlines) and write the model to `path`; equal lines give equal bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=_COVERAGE,
        num_threads=_THREADS,
        # Chinese punctuation, wide spaces and newlines are content: nothing is folded, added or taken away.
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=PAD_ID,
        unk_id=UNK_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        pad_piece="<pad>",
        unk_piece="<unk>",
        bos_piece="<bos>",
        eos_piece="<eos>",
        control_symbols=["<mask>", *(f"<reserved_{number}>" for number in range(RESERVED))],
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


class Tokenizer:
    """A trained model. Ids: 0 <pad>, 1 <unk>, 2 <bos>, 3 <eos>, 4 <mask>, 5..31 reserved, then pieces.

    Of the reserved ones, 5 stands where a row is summed up for search (`embed_id`).

    Pickles as its path. Raises UserError if `path` is not a SentencePiece model.
    """

    pad_id, bos_id, eos_id, mask_id, embed_id = PAD_ID, BOS_ID, EOS_ID, MASK_ID, EMBED_ID

    def __init__(self, path: Path | str):
        self.path = Path(path)
        try:
            model = self.path.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path}: not a usable tokenizer ({error}); run `m6 data fetch`") from error
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.get_piece_size()

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[Path]]:
        return Tokenizer, (self.path,)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_finely(self, text: str) -> list[int]:
        """Each Chinese character by itself, so that a rare word's characters are those of common ones."""
        return [piece for part in _PARTS.findall(text) for piece in self.encode(part)]

    def words(self, text: str) -> list[int]:
        """What a text is found by: its words' pieces, each once, of the words whole and of single Chinese characters.

        In lower case, and every word as it stands after a space, so that it has the same pieces in any text.
        """
        parts = [f" {part}" for part in text.lower().split()]
        pieces = {piece for part in parts for piece in (*self.encode(part), *self.encode_finely(part))}
        return sorted(pieces - set(self.encode(" ")))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special ids say nothing and are skipped."""
        return self._processor.decode([int(i) for i in ids if i >= SPECIAL_IDS])
