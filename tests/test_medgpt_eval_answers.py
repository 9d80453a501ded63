"""Reading answers: a table of real outputs, and garbage that earns nothing."""

import difflib
import random
import re
import string
import time

import pytest

from medgpt.eval.answers import REASONS, final_text, parse_choice, parse_label

DRUGS = {"A": "Trientine", "B": "Calcium", "C": "Penicillamine", "D": "Zinc"}
GERMS = {"A": "C. difficile", "B": "H. pylori", "C": "B. cereus", "D": "S. aureus", "E": "E. coli"}
NONE = {"A": "Aspirin", "B": "Heparin", "C": "Warfarin", "D": "None of the above"}
TEN = dict(zip("ABCDEFGHIJ", [f"Finding number {n}" for n in range(10)], strict=True))
HARMONY = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}"

TABLE = [
    # bare and decorated letters
    (DRUGS, "C", "C"),
    (DRUGS, "C.", "C"),
    (DRUGS, "(C)", "C"),
    (DRUGS, "[C]", "C"),
    (DRUGS, "c", "C"),
    (DRUGS, "c)", "C"),
    (DRUGS, "**C**", "C"),
    (DRUGS, "**C.** Penicillamine", "C"),
    (DRUGS, "`C`", "C"),
    (DRUGS, "<answer>B</answer>", "B"),
    (DRUGS, "Option C", "C"),
    (DRUGS, "B) Calcium", "B"),
    (DRUGS, "B: Calcium", "B"),
    (DRUGS, "B - Calcium", "B"),
    (DRUGS, "B \u2013 Calcium", "B"),
    (DRUGS, "B\n\nCalcium does not chelate copper.", "B"),
    (DRUGS, "B. Calcium\n\nIt does not chelate copper, unlike the others.", "B"),
    # boxed
    (DRUGS, r"\boxed{C}", "C"),
    (DRUGS, r"Thus $\boxed{\text{C}}$.", "C"),
    (DRUGS, r"The final answer is $\boxed{\textbf{(B)}}$", "B"),
    (DRUGS, r"\boxed{Zinc}", "D"),
    (DRUGS, r"\boxed{A} or \boxed{B}", "ambiguous"),
    (DRUGS, r"Option A fails, so is option B. \boxed{D}", "D"),
    # stated
    (DRUGS, "Answer: (C) Penicillamine", "C"),
    (DRUGS, "Answer: C. Penicillamine\n\nExplanation: A, B and D are given.", "C"),
    (DRUGS, "The answer is **C**.", "C"),
    (DRUGS, "The correct answer is B: Calcium.\n\nOption A is used. Option D is used.", "B"),
    (DRUGS, "The best option is: D) Zinc", "D"),
    (DRUGS, "Answer: \n\n**B**", "B"),
    (DRUGS, "Answer\nB", "B"),
    (DRUGS, "Answer C", "C"),
    (DRUGS, "The answer to the question is B", "B"),
    (DRUGS, "I would choose B.", "B"),
    (DRUGS, "Option D is correct.", "D"),
    (DRUGS, "D is the correct answer.", "D"),
    (DRUGS, "The correct answer is (B) because A, C and D are all used.", "B"),
    (DRUGS, "Answer: B. On reflection: final answer: C", "C"),
    (DRUGS, "I think this is most consistent with option (B), since it is no chelator.", "B"),
    (DRUGS, "答案是C", "C"),
    (DRUGS, "正确答案\uff1a\uff08\uff24\uff09", "D"),
    (DRUGS, "选B", "B"),
    # options quoted by their text, whole only
    (DRUGS, "Zinc", "D"),
    (DRUGS, "zinc.", "D"),
    (DRUGS, "The correct answer is Zinc.", "D"),
    (DRUGS, "Answer: Calcium", "B"),
    (DRUGS, "Zinc acetate", "unreadable"),
    (DRUGS, "Calcium and Zinc", "unreadable"),
    (DRUGS, "Penicilamine", "unreadable"),
    ({"A": "5 mg", "B": "5 mg", "C": "10 mg"}, "5 mg", "ambiguous"),
    ({"A": "5 mg", "B": "5 mg", "C": "10 mg"}, "The answer is 5 mg", "ambiguous"),
    (GERMS, "E. coli", "E"),
    (GERMS, "C. difficile", "A"),
    (GERMS, "Answer: B. cereus", "C"),
    (GERMS, "The answer is C. C. difficile is less likely.", "C"),
    (GERMS, "Answer: E. faecalis", "unreadable"),
    (NONE, "None of the above", "D"),
    (NONE, "Answer: D. None of the above", "D"),
    (DRUGS, "None of the above", "none of the options"),
    (DRUGS, "None of these options is right.", "none of the options"),
    # letters inside words, articles, pronouns
    (DRUGS, "Answer: Doctors differ", "unreadable"),
    (DRUGS, "Answer: A patient with Wilson disease", "unreadable"),
    (TEN, "I think that more tests are needed", "unreadable"),
    (TEN, "Answer: I", "I"),
    (DRUGS, "C-reactive protein", "unreadable"),
    (DRUGS, "Vitamin B12", "unreadable"),
    (DRUGS, "Answer: D-dimer", "unreadable"),
    (DRUGS, "A 45-year-old man with Wilson disease", "unreadable"),
    # two letters
    (DRUGS, "A and C", "ambiguous"),
    (DRUGS, "Answer: A, C", "ambiguous"),
    (DRUGS, "Answer: B or C", "ambiguous"),
    (DRUGS, "B/D", "ambiguous"),
    (DRUGS, "The answer is A. The answer is B.", "ambiguous"),
    (DRUGS, "A. Trientine\nB. Calcium\nC. Penicillamine\nD. Zinc", "ambiguous"),
    (DRUGS, "A. Trientine\nD. Zinc", "ambiguous"),
    (DRUGS, "B. Calcium\n\nThe correct answer is: D. Zinc", "D"),
    (DRUGS, "The correct answer is: B. Calcium\n\nThe correct answer is: D. Zinc", "ambiguous"),
    (DRUGS, "Either (A) or (B).", "ambiguous"),
    (DRUGS, "The answer is not A.", "unreadable"),
    (DRUGS, "E", "unreadable"),
    # refusals and nothing
    (DRUGS, "I'm sorry, but I can't help with that.", "refusal"),
    (DRUGS, "As an AI, I cannot provide medical advice about (A).", "refusal"),
    (DRUGS, "I\u2019m not able to view images.", "refusal"),
    (DRUGS, "I am not a doctor, but the answer is B.", "B"),
    (DRUGS, "", "empty"),
    (DRUGS, " \n\t", "empty"),
    # reasoning first
    (DRUGS, HARMONY.format("A? No. The answer is B?", "D<|return|>"), "D"),
    (DRUGS, "<|channel|>analysis<|message|>The answer is B", "no final answer"),
    (DRUGS, "analysisThe answer is A?assistantfinal**B**", "B"),
    (DRUGS, "<think>The answer is A.</think>\nB", "B"),
    (DRUGS, "<think>The answer is A.", "no final answer"),
]


@pytest.mark.parametrize(("options", "text", "expected"), TABLE)
def test_table_of_outputs(options, text, expected):
    answer = parse_choice(text, options)
    assert (answer.value or answer.reason) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", "yes"),
        ("**Yes**.", "yes"),
        ("Yes, because the rate fell.", "yes"),
        ("Answer: maybe", "maybe"),
        (r"\boxed{no}", "no"),
        ("The answer is no.", "no"),
        ("No. The study was too small.", "no"),
        ("No evidence was found", "unreadable"),
        ("Nobody knows", "unreadable"),
        ("yes or no", "ambiguous"),
        ("It depends.", "unreadable"),
        ("I cannot answer that.", "refusal"),
        ("<think>yes</think>no", "no"),
        ("", "empty"),
    ],
)
def test_labels(text, expected):
    answer = parse_label(text, ("yes", "no", "maybe"))
    assert (answer.value or answer.reason) == expected


def test_final_text_keeps_what_is_said():
    assert final_text("plain") == ("plain", None)
    assert final_text(HARMONY.format("x", "one<|return|>")) == ("one", None)


WORDS = ["the", "patient", "has", "chest", "pain", "and", "fever", "with", "raised", "option", "no"]


def garbage(rng: random.Random, options: dict[str, str], gold: str) -> str:
    """Random bytes, words, marks, and cut or mixed up pieces of the gold option's text."""
    kind, text = rng.randrange(6), options[gold]
    if kind == 0:
        return "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x2500)))) for _ in
                       range(rng.randrange(200)))  # fmt: skip
    if kind == 1:
        return " ".join(rng.choices(WORDS, k=rng.randrange(30)))
    if kind == 2:
        marks = [*"\\{}()[]<>|*_$:.\n ", "\\boxed{", "<|channel|>", "<think>", "Answer:"]
        return "".join(rng.choices([*marks, *string.ascii_letters], k=rng.randrange(60)))
    if kind == 3:
        return text[: max(len(text) * 2 // 3, 1)]
    if kind == 4:
        return " ".join(rng.sample(text.split() + WORDS, k=6))
    return "It is " + "".join(rng.sample(text, len(text)))


def credited(parser, seed: int = 0, n: int = 10_000) -> float:
    """The share of garbage outputs that `parser` reads as the gold letter."""
    rng = random.Random(seed)
    hits = 0
    for _ in range(n):
        letters = "ABCDEFGHIJ"[: rng.choice((4, 5, 10))]
        options = {x: " ".join(rng.sample(WORDS, 3)) + f" {rng.random():.3f}" for x in letters}
        gold = rng.choice(letters)
        hits += parser(garbage(rng, options, gold), options) == gold
    return hits / n


def test_fuzz_never_raises_and_credits_no_garbage():
    assert credited(lambda text, options: parse_choice(text, options).value) < 0.01


def test_fuzz_finds_the_defects_of_other_parsers():
    rng = random.Random(1)

    def nearest(text, options):
        ratio = lambda x: difflib.SequenceMatcher(None, text, options[x]).ratio()  # noqa: E731
        return max(options, key=ratio)

    def random_letter(text, options):
        found = re.findall(r"\b[A-J]\b", text)
        return found[0] if found else rng.choice(list(options))

    chance = (1 / 4 + 1 / 5 + 1 / 10) / 3
    assert credited(nearest, n=500) > 1.3 * chance
    assert credited(random_letter, n=2000) > 0.5 * chance


def test_fuzz_labels():
    rng = random.Random(2)
    for _ in range(2000):
        answer = parse_label(garbage(rng, DRUGS, "A"), ("yes", "no", "maybe"))
        assert answer.value in ("yes", "no", "maybe") or answer.reason in REASONS


@pytest.mark.parametrize("piece", ["answer for ", "Answer: A, ", "\\boxed{", "(", "A. x\n", " "])
def test_an_output_that_repeats_itself_is_read_at_once(piece):
    """A model that cannot stop: 100,000 characters, linear."""
    text, started = piece * (100_000 // len(piece)), time.perf_counter()
    parse_choice(text, DRUGS)
    parse_label(text, ("yes", "no"))
    assert time.perf_counter() - started < 20
