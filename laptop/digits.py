"""The digits task, for a laptop: three handwritten digits in a row and a question about them.

Drawn on the fly from 1,797 real digits (assets/README.md). It is built so that VPPO's two mechanisms have something to act
on (paper, Insights 1 and 2):
* token level: a good response first *reads* the digits, as words ("three"), then *computes* with them, as numerals ("3 + 8").
  Only the words need the image: a ground truth for visual dependency that real data never has.
* trajectory level: every question can also be answered by a guess that does not look. Yes/no is easy to guess, sums and
  differences are hard, so some correct responses are lucky.
* every phrase comes in many wordings, so that tokens that need no image carry gradient too; with one fixed template they
  have no entropy, hence no gradient, and filtering them would change nothing.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from prompts import Example

WORDS = "zero one two three four five six seven eight nine".split()  # a digit *read* from the image is written as a word
ASSET = Path(__file__).parents[1] / "assets" / "digits.npz"
# Disjoint pools of handwriting: every ninth of the 1,797 digits to `val`, two ninths to `test`, so that all 13 writers are in
# each. Settings are chosen on `val`; `test` is for final tables.
POOLS = {"train": (1, 2, 3, 5, 6, 7), "val": (0,), "test": (4, 8)}


def draw_digit(pixels, rng, size=28):
    """An 8x8 digit -> (size, size) uint8, dark ink on light paper, slightly rotated, scaled, shifted and faded.

    28 x 28 pixels are exactly one visual token of Qwen2.5-VL (2 x 2 merged patches of 14). Augmentation matters: 1,200
    digits are memorised within 50 RL steps otherwise, and the held-out score stops there.
    """
    angle, scale = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(0.85, 1.15) * 8 / size
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    dx, dy = rng.uniform(-0.6, 0.6, 2)  # in pixels of the 8x8 original: about 2 of the drawn ones
    half = size / 2
    # PIL's affine maps output pixels to input pixels: rotate and scale about the centre, then shift.
    matrix = (cos, -sin, 4 + dx - (cos - sin) * half, sin, cos, 4 + dy - (sin + cos) * half)
    ink = Image.fromarray(pixels * 15).transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return (255 - np.asarray(ink, np.float32) * rng.uniform(0.8, 1.05)).clip(0, 255).astype(np.uint8)


QUESTIONS = {
    "sum": ["what is the first digit plus the last ?", "add the last digit to the first ."],
    "difference": ["what is the first digit minus the last ?", "subtract the last digit from the first ."],
    "yesno": ["is the first digit larger than the last ?", "does the first digit exceed the last ?"],
}
KINDS = list(QUESTIONS)
KIND_SHARE = [0.32, 0.32, 0.36]
OTHER_WORDS = [str(number) for number in range(-9, 19)]  # every result of a difference or a sum


class Digits:
    """The digits task as a sequence: `Digits("train")[i]` is always the same example, however often and by whom it is asked.

    Each example is drawn from a generator keyed by (split, i), so a run's position in its data is one integer and several
    processes agree without talking. Training is endless; validation and test have `len` examples.
    """

    def __init__(self, split="train", length=None):
        if split not in POOLS:
            raise ValueError(f"{type(self).__name__.lower()} has no split '{split}': choose one of {', '.join(POOLS)}")
        with np.load(ASSET) as file:
            mine = np.isin(np.arange(len(file["labels"])) % 9, POOLS[split])
            self.images, self.labels = file["images"][mine], file["labels"][mine]
        usual = 2**31 if split == "train" else 512
        self.split, self.length = split, usual if length is None else length

    def __len__(self):
        return self.length

    def generator(self, i):
        """What example i is drawn from."""
        if not 0 <= i < self.length:
            raise IndexError(i)
        return np.random.default_rng([list(POOLS).index(self.split), i])

    def __getitem__(self, i):
        rng = self.generator(i)
        kind = str(rng.choice(KINDS, p=KIND_SHARE))
        picks = rng.integers(len(self.labels), size=3)
        digits = tuple(int(d) for d in self.labels[picks])
        image = Image.fromarray(np.concatenate([draw_digit(self.images[p], rng) for p in picks], axis=1)).convert("RGB")
        problem = str(rng.choice(QUESTIONS[kind])) + " answer in \\boxed{}"
        answer, _ = solve(kind, digits)
        return Example([image], problem, answer, f"digits {self.split}[{i}]", kind, digits)


def solve(kind, digits):
    """(answer, the computation as a list of words) for three digits: the arithmetic of a response, no looking involved."""
    first, _, last = digits
    if kind == "sum":
        return str(first + last), f"{first} + {last} EQ {first + last}".split()
    if kind == "difference":
        return str(first - last), f"{first} - {last} EQ {first - last}".split()
    relation = "larger" if first > last else "smaller" if first < last else "equal"
    return ("yes" if first > last else "no"), f"{first} VERSUS {last} BE {relation}".split()


# Every capitalised word of a template below stands for one of these, drawn afresh each time.
SYNONYMS = {
    "OK": "okay well right now alright".split(),
    "ME": "i we".split(),
    "LOOK": "look peek check read inspect".split(),
    "CARE": "closely carefully slowly again patiently".split(),
    "SEE": "see find spot notice".split(),
    "THEN": "then next and also plus".split(),
    "SO": "so hence thus now therefore".split(),
    "EQ": "= gives makes is".split(),
    "BE": "is looks seems".split(),
    "VERSUS": "versus against beside".split(),
    "ANSWER": "answer result solution outcome".split(),
    "FINAL": "final whole full".split(),
    "HARD": "hard tough tricky difficult".split(),
    "TELL": "tell say read judge".split(),
    "GUESS": "guess bet reckon suppose".split(),
    "FOR": "it this that".split(),
}
RESULT_FOLLOWS = SYNONYMS["EQ"] + SYNONYMS["BE"]  # the word before the result of a computation
OPENINGS = ["OK ME LOOK CARE :", "OK , ME SEE", "ME LOOK CARE , OK , ME SEE", "OK ME LOOK FOR CARE , ME SEE"]
CLOSINGS = ["SO the ANSWER is", "SO ANSWER :", "SO the FINAL ANSWER is", "OK , SO ME SEE FOR ANSWER"]
GUESSES = [
    "HARD to TELL , SO ME GUESS FOR",
    "OK , ME GUESS",
    "FOR is HARD , OK , ME GUESS the ANSWER is",
    "SO ME GUESS : the ANSWER is",
]


def write_response(example, rng, guess=0.0, misread=0.0):
    """A chain of thought for the digits task, in one of many wordings: what the warm-up teaches.

    With probability `guess` it answers from the prior without looking. Otherwise each digit is read as a word, wrongly with
    probability `misread`, and the arithmetic that follows is right for what was read: a policy taught so knows but is
    unsure, which leaves RL something to do. Returns text; `is_reading` tells which of its words come from the image.
    """
    pick = lambda options: options[rng.integers(len(options))]  # noqa: E731  (rng.choice is 20 times slower)
    if rng.random() < guess:
        words = pick(GUESSES).split()
        answer, _ = solve(example.kind, rng.integers(10, size=3))
    else:
        digits = [int(rng.integers(10)) if rng.random() < misread else d for d in example.digits]
        answer, computation = solve(example.kind, digits)
        read = [WORDS[digits[0]], "THEN", WORDS[digits[1]], "THEN", WORDS[digits[2]], "."]
        words = pick(OPENINGS).split() + read + ["SO"] + computation + ["."] + pick(CLOSINGS).split()
    words = [pick(SYNONYMS[word]) if word in SYNONYMS else word for word in words]
    return " ".join(words) + f" \\boxed{{{answer}}}"


def write_drill(example, rng, more=3):
    """The reading, the computation and the answer without phrasing, then `more` computations with random digits after a ? each.

    Nobody can know those digits: of what follows a ?, only the result is worth learning (`knowable`).
    """
    answer, computation = solve(example.kind, example.digits)
    words = [WORDS[digit] for digit in example.digits] + [".", *computation, f"\\boxed{{{answer}}}"]
    for _ in range(more):
        words += ["?", *solve(KINDS[rng.integers(3)], rng.integers(10, size=3))[1]]
    return " " + " ".join(SYNONYMS[word][rng.integers(len(SYNONYMS[word]))] if word in SYNONYMS else word for word in words)


def knowable(before, word):
    """Whether a drill's word after a ? can be known: the result of a computation, given the word before it."""
    return before.startswith(" ") and before.strip() in RESULT_FOLLOWS


def is_reading(token):
    """True where a token of a digits response states something read from the image: a digit as a word."""
    return token.strip() in WORDS


def is_computed(token):
    """True where a token of a digits response follows from what was read and asked: numerals, signs, comparisons, yes and no."""
    word = token.strip()
    return word in {"+", "-", "yes", "no", "larger", "smaller", "equal"} or word.lstrip("-").isdigit()
