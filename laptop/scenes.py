"""The scenes task, for a laptop: six, eight or nine handwritten digits in two or three rows and a question about them.

Built to compare methods on: harder than the digits task (digits.py), whose handwriting and words it shares.
* A good response reads every row before it computes, so a fifth of its tokens need the image.
* The sum of a row, a difference and a count are hard to guess; a comparison is easy. About a fifth of the correct responses
  of the warmed-up model are guesses.
* Two to nine readings must be right for an answer to be, so a run of 50 steps ends far from perfect, with signal in most
  groups.

    python train.py --data scenes --steps 50 --max_rounds 2        # about a minute on one core, evaluation aside

The same scenes come in four regimes, each with a base policy of its own: it guesses or not, and it is brief or verbose (REGIMES below).
A verbose response is up to 85 tokens long, so it needs --max_new_tokens 96:

    python train.py --data scenes-verbose-honest --steps 40 --max_rounds 2 --max_new_tokens 96
"""

import numpy as np
from PIL import Image

from laptop import digits
from laptop.digits import GUESSES, SYNONYMS, WORDS, Digits, draw_digit, is_computed, is_reading  # noqa: F401  (the task's, too)
from prompts import Example
from reward import extract_answer

SHAPES = [(2, 3), (2, 4), (3, 3)]  # rows, columns
ROWS = {2: ["top", "bottom"], 3: ["top", "middle", "bottom"]}
QUESTIONS = {
    "sum": ["what do the digits of the {} row add up to ?", "add up the {} row ."],
    "difference": [
        "what is the first digit of the {} row minus the last ?",
        "subtract the last digit of the {} row from the first .",
    ],
    "count": ["how many digits are larger than 5 ?", "count the digits that exceed 5 ."],
    "yesno": [
        "is the first digit of the {} row larger than the last ?",
        "does the first digit of the {} row exceed the last ?",
    ],
}
KINDS = list(QUESTIONS)
KIND_SHARE = [0.3, 0.35, 0.2, 0.15]
OTHER_WORDS = [*ROWS[3], *map(str, range(-9, 37))]  # every result, and what the vocabulary needs beside the templates
OPENINGS = ["ME LOOK CARE :", "ME SEE :", "OK , ME SEE", "ME LOOK FOR :"]
CLOSINGS = ["SO the ANSWER is", "SO ANSWER :", "the ANSWER is"]
# A filler is a sentence that means nothing: one word from each list, whichever ("maybe ponder about this picture twice .").
# No word of it depends on the image, on the question, or on another word, so whatever gradient it has is noise.
FILLERS = [
    "maybe perhaps surely honestly simply calmly gladly really".split(),
    "ponder wonder think reflect muse dwell linger pause".split(),
    "about over upon around beyond behind across within".split(),
    "this that every any some each another such".split(),
    "picture drawing image sketch page sheet board frame".split(),
    "twice often briefly deeply soundly quietly gently awhile".split(),
]

# What the warm-up teaches in each regime (--data NAME -> its part of tiny.RECIPES), beyond how to read and to compute:
# guess    share of responses that answer without looking ("i bet it : ..."); an honest base policy has none
# misread  share of digits that are read wrongly, so that there is something left to learn
# fillers  filler sentences of a response that reads; half of them follow the reading, half the computation. A guess has half as many.
# `guess` and `misread` were chosen on validation data, so that every base policy is right on 0.20 to 0.26 of its responses.
REGIMES = {
    "scenes": dict(guess=0.43, misread=0.43),
    "scenes-honest": dict(clean_guess=0.0, guess=0.0, misread=0.53),
    "scenes-verbose": dict(guess=0.43, misread=0.39, fillers=6),
    "scenes-verbose-honest": dict(clean_guess=0.0, guess=0.0, misread=0.46, fillers=6),
}


class Scenes(Digits):
    """The scenes task as a sequence, drawn from the same pools of handwriting by the same rules as `Digits`."""

    def __getitem__(self, i):
        rng = self.generator(i)
        kind = str(rng.choice(KINDS, p=KIND_SHARE))
        rows, columns = SHAPES[rng.integers(len(SHAPES))]
        picks = rng.integers(len(self.labels), size=(rows, columns))
        pixels = [np.concatenate([draw_digit(self.images[p], rng) for p in row], axis=1) for row in picks]
        image = Image.fromarray(np.concatenate(pixels)).convert("RGB")
        asked = str(rng.choice(ROWS[rows]))
        problem = str(rng.choice(QUESTIONS[kind])).format(asked) + " answer in \\boxed{}"
        shown = tuple(tuple(int(d) for d in row) for row in self.labels[picks])
        answer, _ = solve(kind, shown, asked)
        return Example([image], problem, answer, f"scenes {self.split}[{i}]", kind, shown, asked)


def solve(kind, rows, asked):
    """(answer, the computation as a list of words) for rows of digits: the arithmetic of a response, no looking involved."""
    names = ROWS[len(rows)]
    if kind == "count":
        counts = [sum(digit > 5 for digit in row) for row in rows]
        words = " + ".join(f"{name} {count}" for name, count in zip(names, counts))
        return str(sum(counts)), [*words.split(), "EQ", str(sum(counts))]
    first, *others = rows[names.index(asked)]
    if kind == "sum":
        words, total = f"{asked} {first}", first
        for digit in others:
            total += digit
            words += f" + {digit} EQ {total}"
        return str(total), words.split()
    answer, computation = digits.solve(kind, (first, None, others[-1]))
    return answer, [asked, *computation]


def read(rows):
    """The words of a reading: each row's name and its digits."""
    words = []
    for name, row in zip(ROWS[len(rows)], rows):
        words += [name, *(WORDS[digit] for digit in row), ","]
    return [*words[:-1], "."]


def spoil(rows, rng, misread):
    """The digits as they are read: each replaced by a random one with probability `misread`."""
    return [[int(rng.integers(10)) if rng.random() < misread else digit for digit in row] for row in rows]


def vary(words, rng):
    """Every capitalised word replaced by one of its synonyms."""
    return " ".join(SYNONYMS[word][rng.integers(len(SYNONYMS[word]))] if word in SYNONYMS else word for word in words)


def write_response(example, rng, guess=0.0, misread=0.0, fillers=0):
    """A chain of thought in one of many wordings: what the warm-up teaches. As `digits.write_response`, and with `fillers` sentences."""
    pick = lambda options: options[rng.integers(len(options))]  # noqa: E731
    ponder = lambda: [pick(words) for _ in range(fillers // 2) for words in (*FILLERS, ["."])]  # noqa: E731
    if rng.random() < guess:
        words = ponder() + pick(GUESSES).split()
        answer, _ = solve(example.kind, spoil(example.digits, rng, 1.0), example.asked)
    else:
        rows = spoil(example.digits, rng, misread)
        answer, computation = solve(example.kind, rows, example.asked)
        words = pick(OPENINGS).split() + read(rows) + ponder() + ["SO"] + computation + ["."] + ponder() + pick(CLOSINGS).split()
    return vary(words, rng) + f" \\boxed{{{answer}}}"


FAILURES = ["reads nothing", "broken form", "miscomputed", "misread"]


def failure(response, example):
    """Why a wrong response is wrong, one of FAILURES: in scenes this can be told from what it says.

    "reads nothing": no digit is named. "broken form": there is no answer, or the reading names other rows than the scene has, or
    another number of digits in one. "miscomputed": the answer does not follow from the digits as they were read, which may be wrong, too.
    "misread": it does follow, so a digit is wrong.
    """
    words = response.split()
    if not any(map(is_reading, words)):
        return "reads nothing"
    begin = next((i for i, word in enumerate(words) if word in ROWS[3]), len(words))
    reading = " ".join(words[begin : words.index(".", begin) if "." in words[begin:] else len(words)])
    rows = [part.split() or [""] for part in reading.split(",")]  # the name of a row, and its digits
    form = [(name, len(row)) for name, row in zip(ROWS[len(example.digits)], example.digits)]
    answer, digits = extract_answer(response), [word for _, *row in rows for word in row]
    if answer is None or [(name, len(row)) for name, *row in rows] != form or not all(map(is_reading, digits)):
        return "broken form"
    read = tuple(tuple(WORDS.index(word) for word in row) for _, *row in rows)
    return "misread" if answer.strip() == solve(example.kind, read, example.asked)[0] else "miscomputed"


def write_drill(example, rng, more=2):
    """The reading, the computation and the answer without phrasing; after a ? the same for made-up digits, `more` times.

    Nobody can know made-up digits, but once they are read, what is computed from them follows (`knowable`). They teach to
    compute from what was read, for the picture shows others; without them the model looks its operands up in the picture.
    """
    words = []
    for i in range(1 + more):
        rows = spoil(example.digits, rng, float(i > 0))
        answer, computation = solve(example.kind, rows, example.asked)
        words += [*read(rows), *computation, f"\\boxed{{{answer}}}", "?"]
    return " " + vary(words[:-1], rng)


def knowable(before, word):
    """Whether a drill's word after a ? can be known: not what would have to be read."""
    return not is_reading(word)
