"""BLEU, ROUGE-L, METEOR, CIDEr-D and CheXbert's F1 by hand and by second implementations."""

import math
import random

import numpy as np
import pytest

from medgpt.eval.report_metrics import chexbert, text

REFERENCES = [
    "The heart is normal in size. The lungs are clear.",
    "No pleural effusion or pneumothorax.",
    "Mild bibasilar atelectasis, XR of 12.5 cm; no focal consolidation.",
    "Stable cardiomegaly with small left pleural effusion. The heart is large.",
]
GENERATED = [
    "The heart is normal. The lungs are clear.",
    "There is a small pleural effusion.",
    "Mild atelectasis at both bases and no consolidation.",
    "Stable cardiomegaly with small left pleural effusion. The heart is large.",
]


def values(scores):
    return {score.name: score.value for score in scores}


def per_report(score):
    return score.of(np.eye(len(score.parts)))


def test_bleu_by_hand():
    # 4 of 5 words; bigrams no/acute, acute/disease, disease/seen: 2 of 4; brevity 1
    got = values(text.bleu_scores(["no acute disease is seen"], ["no acute disease seen now"]))
    assert got["bleu_1"] == pytest.approx(4 / 5)
    assert got["bleu_2"] == pytest.approx(math.sqrt(4 / 5 * 2 / 4))
    assert got["bleu_4"] == 0
    # 2 words for 4: precision 1, brevity exp(1 - 4 / 2)
    got = values(text.bleu_scores(["no acute disease seen"], ["No acute"]))
    assert got["bleu_1"] == pytest.approx(math.exp(-1))
    # clipped: "the" is in the reference once
    assert values(text.bleu_scores(["the lungs"], ["the the"]))["bleu_1"] == pytest.approx(0.5)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_corpus_bleu_equals_sacrebleu_and_nltk(order):
    from nltk.translate.bleu_score import corpus_bleu
    from sacrebleu.metrics import BLEU
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    ours = values(text.bleu_scores(REFERENCES, GENERATED))[f"bleu_{order}"]
    metric = BLEU(lowercase=True, smooth_method="none", max_ngram_order=order)
    assert ours == pytest.approx(metric.corpus_score(GENERATED, [REFERENCES]).score / 100)
    said, meant = ([Tokenizer13a()(t.lower()).split() for t in s] for s in (GENERATED, REFERENCES))
    weights = (1 / order,) * order
    assert ours == pytest.approx(corpus_bleu([[m] for m in meant], said, weights=weights))
    # negative control: sides swapped is another number
    assert ours != pytest.approx(values(text.bleu_scores(GENERATED, REFERENCES))[f"bleu_{order}"])


def longest_common(a, b) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        above, row = row, [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    return row[-1]


def test_rouge_l_by_hand_and_by_dynamic_programming():
    # longest common subsequence no/acute/seen: 3 of 4 said, 3 of 5 meant
    score = text.rouge_l(["no acute disease is seen"], ["no acute finding seen"])
    assert score.parts[0] == pytest.approx([2 * 3 / 4 * 3 / 5 / (3 / 4 + 3 / 5), 3 / 4, 3 / 5])
    rng = random.Random(0)
    words = ["heart", "lungs", "clear", "small", "effusion", "no", "left"]
    pairs = [[rng.choices(words, k=rng.randint(1, 9)) for _ in range(2)] for _ in range(200)]
    score = text.rouge_l(
        *([" ".join(side) for side in sides] for sides in zip(*pairs, strict=True))
    )
    for (meant, said), got in zip(pairs, score.parts, strict=True):
        common = longest_common(meant, said)
        assert got[1:] == pytest.approx([common / len(said), common / len(meant)])


def test_meteor_by_hand():
    # 3 of 4 words each side match, in one chunk: F = 3/4, penalty 0.5 (1/3)^3
    score = text.meteor(["no acute disease seen"], ["no acute disease found"])
    assert score.value == pytest.approx(3 / 4 * (1 - 0.5 / 27))
    # stems match: effusions, effusion
    assert text.meteor(["effusions"], ["effusion"]).value == pytest.approx(0.5)
    # recall weighs nine times precision: P = 1, R = 1/2
    fmean = 1 * 0.5 / (0.9 * 1 + 0.1 * 0.5)
    assert text.meteor(["no acute"], ["no"]).value == pytest.approx(fmean * 0.5)
    # no synonyms
    assert text.meteor(["heart"], ["cardiac"]).value == 0


def test_cider_d_by_hand():
    # one word a report, four reports: idf log 4 for "edema", log 2 for "clear" (in two)
    references = ["clear", "clear", "edema", "nodule"]
    score = text.cider_d(references, ["clear", "edema", "edema edema", "clear"])
    # unigrams alone are there: cosine 1 / 4 orders, times 10
    assert per_report(score)[0] == pytest.approx(10 / 4)
    assert per_report(score)[1] == 0
    # clipped to one "edema": cosine (1 * 1) / (2 * 1), length penalty exp(-1 / 72)
    assert per_report(score)[2] == pytest.approx(10 / 4 * 0.5 * math.exp(-1 / 72))
    assert per_report(score)[3] == 0
    same = text.cider_d(REFERENCES, REFERENCES)
    assert per_report(same) == pytest.approx([10.0] * 4)
    with pytest.raises(ValueError, match="two or more reports"):
        text.cider_d(["a"], ["a"])


def test_an_empty_report_is_zero_everywhere_and_stays_in_the_mean():
    full = text.text_scores(REFERENCES, GENERATED)
    part = text.text_scores(REFERENCES, [*GENERATED[:3], ""])
    for before, after in zip(full, part, strict=True):
        assert per_report(after)[3] == 0, after.name
        assert per_report(after)[:3] == pytest.approx(per_report(before)[:3])
        assert after.value < before.value
        # leaving it out would be another number
        assert after.of([1, 1, 1, 0]) != pytest.approx(after.value), after.name


def test_words_are_lower_case_and_without_punctuation():
    assert text.words("No acute, 12.5-cm (XR)!  ") == ["no", "acute", "12.5", "cm", "xr"]


@pytest.mark.slow
def test_cider_d_equals_cocos_on_real_reports():
    from material import reports

    coco = pytest.importorskip("pycocoevalcap.cider.cider", reason="pip install pycocoevalcap")
    references = list(reports(200))
    said = [" ".join(t.split()[: 5 + at % 30]) for at, t in enumerate(references)]
    sides = ({at: [" ".join(text.words(t))] for at, t in enumerate(s)} for s in (references, said))
    mean, each = coco.Cider().compute_score(*sides)
    score = text.cider_d(references, said)
    assert score.value == pytest.approx(mean)
    assert per_report(score) == pytest.approx(each)


# CheXbert


def f1(tp, fp, fn):
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0


def random_labels(seed, reports=60):
    rng = np.random.default_rng(seed)
    return rng.choice([np.nan, 1.0, 0.0, -1.0], p=[0.6, 0.2, 0.1, 0.1], size=(reports, 14))


@pytest.mark.parametrize("uncertain", ["positive", "negative"])
def test_chexbert_f1_counted_label_by_label(uncertain):
    meant, said = random_labels(0), random_labels(1)
    meant[:, 11] = said[:, 11] = np.nan  # a label positive nowhere counts 0 in the macro mean
    found = values(chexbert.chexbert_scores(meant, said, "x", uncertain))
    good = (1, -1) if uncertain == "positive" else (1,)
    for names, tag in ((chexbert.LABELS, 14), (chexbert.TOP5, 5)):
        counts = []
        for name in names:
            at = chexbert.LABELS.index(name)
            pairs = [(m in good, s in good) for m, s in zip(meant[:, at], said[:, at], strict=True)]
            counts.append([pairs.count(c) for c in ((True, True), (False, True), (True, False))])
        pooled = [sum(c[i] for c in counts) for i in range(3)]
        assert found[f"chexbert_f1_{tag}_micro"] == pytest.approx(f1(*pooled))
        macro = sum(f1(*c) for c in counts) / len(names)
        assert found[f"chexbert_f1_{tag}_macro"] == pytest.approx(macro)


def test_uncertain_and_swapped_sides_are_noticed():
    meant, said = random_labels(0), random_labels(1)
    ours = chexbert.chexbert_scores(meant, said, "x")
    other = chexbert.chexbert_scores(meant, said, "x", "negative")
    assert ours[0].value != pytest.approx(other[0].value, abs=1e-3)
    totals = dict(zip(ours[0].columns, ours[0].parts.sum(0), strict=True))
    at = chexbert.LABELS.index("Cardiomegaly")
    meant, said = (np.isin(labels[:, at], (1, -1)) for labels in (meant, said))
    cells = {"tp": meant & said, "fp": ~meant & said, "fn": meant & ~said}
    assert {name: totals[f"{name}:Cardiomegaly"] for name in cells} == {
        n: c.sum() for n, c in cells.items()
    }
    assert cells["fp"].sum() != cells["fn"].sum()
    with pytest.raises(ValueError, match="uncertain"):
        chexbert.positives(meant, "blank")


def test_top5_is_f1chexberts():
    at = [chexbert.LABELS.index(name) for name in chexbert.TOP5]
    assert at == [1, 4, 5, 7, 9]
    assert len(chexbert.LABELS) == 14
    assert chexbert.LABELS[-1] == "No Finding"


def test_sembscore_is_the_cosine():
    meant = np.array([[3.0, 4], [1, 0], [1, 0], [1, 2]])
    said = np.array([[6.0, 8], [0, 2], [-1, 0], [0, 0]])
    score = chexbert.sembscore(meant, said, "x")
    assert per_report(score) == pytest.approx([1, 0, -1, 0])
    assert score.value == 0
