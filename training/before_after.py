"""What fine-tuning changed: a run and the checkpoint that it started from, on the very same rows.

On the held-out pictures of the run's own data, and, for what was forgotten, on those of the data that its parent had
learned from. Differences are paired, a concept family (or a text) at a time; intervals are of 95 %.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from training import quality
from training.data.corpus import Corpus
from training.errors import UserError
from training.measures.bootstrap import Paired, paired_bootstrap, paired_bootstrap_score
from training.measures.captions import CaptionScores, caption_scores, chrf_of
from training.measures.retrieval import Recall
from training.own_data import own_corpus
from training.parent import Parent
from training.quality import Pair, Report, Tell
from training.trained import M6

TEXTS = 200  # of each kind
KINDS = ("poem", "review")
WAYS = ("image_to_text", "text_to_image")


@dataclass(frozen=True)
class Before:
    """The model that a run started from, and the data that it had learned from, if that is still there."""

    model: M6
    checkpoint: str
    own: Corpus | None

    @classmethod
    def of(cls, m: M6, corpus: Corpus) -> Before:
        """Of a run with a start; `corpus`: whose tokenizer both read by. Raises UserError if it is gone."""
        assert m.recipe
        parent = Parent.of(m.recipe)
        try:
            own = own_corpus(parent.path, parent.manifest, parent.recipe)
        except UserError:
            own = None
        data = corpus.folder.parent if own is None else parent.recipe.data
        return cls(M6.load(parent.path, data=data), str(parent.path), own)


@dataclass(frozen=True)
class Seen:
    """What a model makes of pictures and their words; None of what it has not learned."""

    recalls: dict[str, Recall] | None
    captions: CaptionScores | None

    @classmethod
    def of(cls, m: M6, pairs: Sequence[Pair]) -> Seen:
        recalls = captions = None
        if m.learned("contrast"):
            _, recalls = quality.measure_retrieval(quality.similarities(m, pairs), pairs)
        if m.learned("caption"):
            references = [[pair.name, *pair.references] for pair in pairs]
            captions = caption_scores(m.captions([pair.image for pair in pairs]), references)
        return cls(recalls, captions)


def compare(m: M6, before: Before, corpus: Corpus, split: str, own: Sequence[Pair], tell: Tell) -> Report:
    """On `own` pictures, and as `elsewhere` on the split of what the parent had learned from, if it is still there.

    `corpus`: that of the own pictures; what the parent had learned from may be the same.
    """
    tell("before and after: own pictures")
    found: Report = {"checkpoint": before.checkpoint, "own": on_pictures(m, before.model, own)}
    if before.own and before.own.fingerprint != corpus.fingerprint:
        tell("before and after: what its parent had learned from")
        rows = quality.picture_rows(before.own, split)
        pairs = [quality.pair_of(before.own.picture(row)) for row in rows]
        found["elsewhere"] = on_pictures(m, before.model, pairs) | on_texts(m, before.model, before.own, split)
    return found


def on_pictures(after: M6, before: M6, pairs: Sequence[Pair]) -> Report:
    """Finding both ways, and captions: before, after, and by how much the second is the better."""
    if not pairs:
        return {"n": 0}
    families = [pair.family for pair in pairs]
    now, was = Seen.of(after, pairs), Seen.of(before, pairs)
    found: Report = {"n": len(pairs)}
    for way, k in itertools.product(WAYS, (1, 5, 10)):
        if now.recalls and was.recalls:
            a_Q, b_Q = now.recalls[way].hits_Q(k), was.recalls[way].hits_Q(k)
            found[f"{way} r{k}"] = _report(paired_bootstrap(a_Q, b_Q, families), a_Q.mean(), b_Q.mean())
    if now.captions and was.captions:
        a, b = now.captions, was.captions
        found["caption chrf"] = _report(paired_bootstrap_score(chrf_of, a.chrf_NS, b.chrf_NS, families), a.chrf, b.chrf)
        found["caption cider"] = _report(paired_bootstrap(a.cider_N, b.cider_N, families), a.cider, b.cider)
        found["caption exact"] = _report(paired_bootstrap(a.exact_N, b.exact_N, families), a.exact, b.exact)
    return found


def on_texts(after: M6, before: M6, corpus: Corpus, split: str) -> Report:
    """Bits a character of TEXTS of each kind, without prompts; fewer are better, so a loss is above 0."""
    found: Report = {}
    for kind in KINDS:
        texts = [text.text for text in quality.corpus_texts(corpus, split, kind)[:TEXTS]]
        if not texts:
            continue
        now_N, was_N = (m.bits([("", text) for text in texts]) for m in (after, before))
        lengths_N, numbers = quality.lengths(texts), [str(number) for number in range(len(texts))]
        paired = paired_bootstrap(now_N, was_N, numbers, lengths_N)
        whole = lengths_N.sum()
        found[f"text {kind}"] = _report(paired, now_N.sum() / whole, was_N.sum() / whole) | {"texts": len(texts)}
    return found


def _report(paired: Paired, after: Any, before: Any) -> dict[str, float]:
    return {"before": float(before), "after": float(after), **vars(paired)}
