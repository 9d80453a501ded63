"""Metrics that need no weights: BLEU, ROUGE-L, METEOR without synonyms, CIDEr-D.

BLEU by sacrebleu (13a tokens, lower-cased), ROUGE-L by rouge-score, METEOR by nltk, whose exact and
stem stages need no data; CIDEr-D is written out here, since its packages need Java or torch models.
METEOR and CIDEr-D see sacrebleu's tokens lower-cased, without those that hold no letter or digit,
as COCO's tokenizer drops punctuation.
"""

import math
from collections import Counter

import numpy as np

from medgpt.eval.report_metrics.scores import Score, mean_score, ratio

ORDER = 4
SIGMA = 6.0


def words(text: str) -> list[str]:
    """Lower-cased 13a tokens that hold a letter or digit."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokens = Tokenizer13a()(text.lower()).split()
    return [token for token in tokens if any(letter.isalnum() for letter in token)]


def _corpus_bleu(order: int):
    """BLEU of sums [..., 2 ORDER + 2]: matches, n-grams, generated length, reference length."""

    def combine(sums, _reports=None):
        matches, grams = sums[..., :order], sums[..., ORDER : ORDER + order]
        generated, reference = sums[..., -2], sums[..., -1]
        precisions = ratio(matches, grams)
        safe = np.where(precisions > 0, precisions, 1.0)
        mean = np.exp(np.log(safe).mean(-1)) * (precisions > 0).all(-1)
        short = np.where(generated < reference, 1 - ratio(reference, generated), 0.0)
        return mean * np.exp(short) * (generated > 0)

    return combine


def bleu_scores(references, generated) -> list[Score]:
    """Corpus BLEU-1 to BLEU-4, 0 to 1, without smoothing (Papineni et al., ACL 2002)."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(lowercase=True, tokenize="13a", smooth_method="none", effective_order=True)
    found = [
        metric.sentence_score(said, [meant])
        for said, meant in zip(generated, references, strict=True)
    ]
    parts = [[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in found]
    parts = np.array(parts, np.float64).reshape(-1, 2 * ORDER + 2)
    columns = [f"{what}_{n}" for what in ("matches", "ngrams") for n in range(1, ORDER + 1)]
    columns = (*columns, "generated_tokens", "reference_tokens")
    variant = "corpus BLEU-{}, sacrebleu 13a, lower-cased, no smoothing"
    return [
        Score(f"bleu_{n}", variant.format(n), columns, parts, _corpus_bleu(n))
        for n in range(1, ORDER + 1)
    ]


def rouge_l(references, generated) -> Score:
    """ROUGE-L F1 of whole reports, without stemming (Lin, 2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(references, generated, strict=True)
    found = np.array([scorer.score(*pair)["rougeL"] for pair in pairs]).reshape(-1, 3)
    return mean_score(
        "rouge_l",
        "ROUGE-L F1, rouge-score, no stemming, report as one sentence",
        found[:, 2],
        extra={"rouge_l_precision": found[:, 0], "rouge_l_recall": found[:, 1]},
    )


class _NoSynonyms:
    """Stands where nltk asks for WordNet: no word has any."""

    def synsets(self, word):
        return ()


def meteor(references, generated) -> Score:
    """METEOR of exact and Porter-stem matches (Lavie and Agarwal, 2007), without WordNet."""
    from nltk.translate.meteor_score import single_meteor_score

    pairs = zip(references, generated, strict=True)
    values = [
        single_meteor_score(words(meant), words(said), wordnet=_NoSynonyms())
        for meant, said in pairs
    ]
    variant = "METEOR 2007, exact and stem stages only, nltk, alpha 0.9 beta 3 gamma 0.5"
    return mean_score("meteor_exact_stem", variant, values)


def _ngrams(tokens) -> Counter:
    return Counter(
        tuple(tokens[at : at + n]) for n in range(1, ORDER + 1) for at in range(len(tokens) - n + 1)
    )


def _tfidf(counts: Counter, frequency: Counter, documents: int):
    """[{ngram: weight}] by order, their norms."""
    vectors = [{} for _ in range(ORDER)]
    for gram, count in counts.items():
        idf = math.log(documents) - math.log(max(1, frequency[gram]))
        vectors[len(gram) - 1][gram] = count * idf
    return vectors, [math.sqrt(sum(w * w for w in vector.values())) for vector in vectors]


def _cider_pair(
    reference: Counter, generated: Counter, frequency: Counter, documents: int
) -> float:
    meant, meant_norm = _tfidf(reference, frequency, documents)
    said, said_norm = _tfidf(generated, frequency, documents)
    lengths = [sum(n for gram, n in c.items() if len(gram) == 1) for c in (reference, generated)]
    penalty = math.exp(-((lengths[0] - lengths[1]) ** 2) / (2 * SIGMA**2))
    total = 0.0
    for n in range(ORDER):
        norms = meant_norm[n] * said_norm[n]
        if norms:
            shared = said[n].keys() & meant[n].keys()
            total += sum(min(said[n][g], meant[n][g]) * meant[n][g] for g in shared) / norms
    return 10 * penalty * total / ORDER


def cider_d(references, generated) -> Score:
    """CIDEr-D, 0 to 10, one reference a report (Vedantam et al., CVPR 2015).

    Document frequencies are those of all references and stay fixed in resamples and slices. The
    length penalty compares words; COCO's code compares bigrams, which is the same number from one
    word on.

    Raises:
        ValueError: fewer than two reports, where every inverse document frequency is 0.
    """
    if len(references) < 2:
        raise ValueError(f"cider_d: expected two or more reports, got {len(references)}")
    meant = [_ngrams(words(text)) for text in references]
    said = [_ngrams(words(text)) for text in generated]
    frequency = Counter(gram for grams in meant for gram in grams)
    values = [_cider_pair(*pair, frequency, len(meant)) for pair in zip(meant, said, strict=True)]
    variant = "CIDEr-D, n 1-4, sigma 6, document frequencies of these references"
    return mean_score("cider_d", variant, values, range=(0.0, 10.0))


def text_scores(references, generated) -> list[Score]:
    """All of the above; an empty report is 0 in each."""
    scores = bleu_scores(references, generated)
    scores += [rouge_l(references, generated), meteor(references, generated)]
    # the idf of one report alone is 0 everywhere: no CIDEr-D, and no reason to lose the others
    return scores if len(references) < 2 else [*scores, cider_d(references, generated)]
