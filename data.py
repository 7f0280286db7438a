"""Examples: an image (or several), a problem, the true answer.

Two sources, one shape. `digits` is the laptop task: three handwritten digits in a row and a question about them, drawn on
the fly from 1,797 real digits (assets/README.md). Anything else is a folder in Hugging Face's ImageFolder layout, or a hub
id read through the `datasets` package.

The digits task is built so that VPPO's two mechanisms have something to act on (paper, Insights 1 and 2):
* token level: a good response first *reads* the digits, as words ("three"), then *computes* with them, as numerals ("3 + 8").
  Only the words need the image: a ground truth for visual dependency that real data never has.
* trajectory level: every question can also be answered by a guess that does not look. Yes/no is easy to guess, sums and
  differences are hard, so some correct responses are lucky.
* every phrase comes in many wordings, so that tokens that need no image carry gradient too; with one fixed template they
  have no entropy, hence no gradient, and filtering them would change nothing.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

WORDS = "zero one two three four five six seven eight nine".split()  # a digit *read* from the image is written as a word
ASSET = Path(__file__).parent / "assets" / "digits.npz"
# Disjoint pools of handwriting: every ninth of the 1,797 digits to `val`, two ninths to `test`, so that all 13 writers are in
# each. Settings are chosen on `val`; `test` is for final tables.
POOLS = {"train": (1, 2, 3, 5, 6, 7), "val": (0,), "test": (4, 8)}


@dataclass
class Example:
    """One row: what the policy sees (images, problem) and what the reward knows (answer)."""

    images: list  # PIL images, in the order of the <image> placeholders
    problem: str
    answer: str
    name: str = "example"  # where it comes from, for error messages: file and row
    kind: str = ""  # digits task: "sum", "difference" or "yesno"
    digits: tuple = ()  # digits task: what the image really shows


# ---------------------------------------------------------------------------------------------------------------------
# The digits task
# ---------------------------------------------------------------------------------------------------------------------
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


class Digits:
    """The digits task as a sequence: `Digits("train")[i]` is always the same example, however often and by whom it is asked.

    Each example is drawn from a generator keyed by (split, i), so a run's position in its data is one integer and several
    processes agree without talking. Training is endless; validation and test have `len` examples.
    """

    def __init__(self, split="train", length=None):
        if split not in POOLS:
            raise ValueError(f"digits has no split '{split}': choose one of {', '.join(POOLS)}")
        with np.load(ASSET) as file:
            mine = np.isin(np.arange(len(file["labels"])) % 9, POOLS[split])
            self.images, self.labels = file["images"][mine], file["labels"][mine]
        usual = 2**31 if split == "train" else 512
        self.split, self.length = split, usual if length is None else length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if not 0 <= i < self.length:
            raise IndexError(i)
        rng = np.random.default_rng([list(POOLS).index(self.split), i])
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

    Nobody can know those digits: of what follows a ?, only the result is worth learning (`RESULT_FOLLOWS`).
    """
    answer, computation = solve(example.kind, example.digits)
    words = [WORDS[digit] for digit in example.digits] + [".", *computation, f"\\boxed{{{answer}}}"]
    for _ in range(more):
        words += ["?", *solve(KINDS[rng.integers(3)], rng.integers(10, size=3))[1]]
    return " " + " ".join(SYNONYMS[word][rng.integers(len(SYNONYMS[word]))] if word in SYNONYMS else word for word in words)


def is_reading(token):
    """True where a token of a digits response states something read from the image: a digit as a word."""
    return token.strip() in WORDS


def is_computed(token):
    """True where a token of a digits response follows from what was read and asked: numerals, signs, comparisons, yes and no."""
    word = token.strip()
    return word in {"+", "-", "yes", "no", "larger", "smaller", "equal"} or word.lstrip("-").isdigit()


# ---------------------------------------------------------------------------------------------------------------------
# Data from files
# ---------------------------------------------------------------------------------------------------------------------
# What the paper appends to every question (Section 4): think first, then a boxed answer that a program can find.
INSTRUCTION = (
    "Think about the question first and write your reasoning inside <think> </think>. "
    "Then give the final answer in \\boxed{}."
)


class Folder:
    """Rows of a Hugging Face ImageFolder: metadata.jsonl with file_name (or file_names), problem and answer; lazy images.

    Every row is checked when the folder is read, the pixels when they are needed. Raises ValueError naming file and line.
    """

    def __init__(self, folder, instruction=INSTRUCTION):
        self.folder, self.instruction = Path(folder), instruction
        self.file = self.folder / "metadata.jsonl"
        if not self.file.exists():
            raise ValueError(f"data folder '{folder}' has no metadata.jsonl: one JSON object a line with file_name, problem, answer")
        self.rows = []
        for number, line in enumerate(self.file.read_bytes().split(b"\n"), 1):
            if line.strip():
                self.rows.append(self.check(line, f"{self.file}, line {number}"))
        if not self.rows:
            raise ValueError(f"{self.file} has no rows")

    def check(self, line, name):
        """One line of metadata.jsonl -> (name, image paths, problem, answer)."""
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{name}: not JSON in UTF-8 ({str(error).splitlines()[0]})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{name}: not a JSON object with file_name, problem, answer")
        files = row.get("file_names") or [row.get("file_name")]
        if not isinstance(files, list) or not all(isinstance(file, str) and file for file in files):
            raise ValueError(f"{name}: no image: set file_name to a path or file_names to a list of paths (found {', '.join(row)})")
        for key in ("problem", "answer"):
            value = row.get(key)
            if not isinstance(value, (str, int, float)) or not str(value).strip():
                raise ValueError(f"{name}: no {key}, which must be a text or a number (found {', '.join(row)})")
        for file in files:
            if not (self.folder / file).is_file():
                raise ValueError(f"{name}: image '{file}' does not exist in {self.folder}")
        return name, [self.folder / file for file in files], str(row["problem"]), str(row["answer"])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        name, files, problem, answer = self.rows[i]
        images = [open_image(file, name) for file in files]
        return Example(images, join_prompt(problem, self.instruction), answer, name)


class Hub:
    """A data set of the Hugging Face hub (or a local copy) read by the `datasets` package: columns images, problem, answer."""

    def __init__(self, name, split, instruction=INSTRUCTION):
        try:
            import datasets
        except ImportError as error:
            raise ImportError(f"data '{name}' is not a local folder, and the hub needs: pip install datasets") from error
        try:
            self.rows = datasets.load_dataset(name, split=split)
        except Exception as error:  # datasets raises a dozen kinds of error; the user needs the first sentence of any
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"data '{name}' is neither a local folder nor a readable hub data set: {reason}") from error
        self.name, self.split, self.instruction = name, split, instruction
        missing = {"images", "problem", "answer"} - set(self.rows.column_names)
        if missing:
            raise ValueError(f"{name}: no column {', '.join(sorted(missing))} (found {', '.join(self.rows.column_names)})")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row, name = self.rows[i], f"{self.name} {self.split}[{i}]"
        images = [open_image(image, name) for image in row["images"] or []]
        if not images or not str(row["answer"] or "").strip():
            raise ValueError(f"{name}: no {'answer' if images else 'image'}")
        return Example(images, join_prompt(row["problem"], self.instruction), str(row["answer"]), name)


def join_prompt(problem, instruction):
    """The question, a blank line, the instruction (paper, Section 4)."""
    return f"{problem}\n\n{instruction}" if instruction else problem


def open_image(source, name):
    """A file or PIL image -> upright RGB image, transparency on white; ValueError naming the row if it does not open."""
    try:
        image = ImageOps.exif_transpose(Image.open(source) if isinstance(source, (str, Path)) else source)
        if image.mode.startswith("I"):  # 16 and 32 bits a pixel: scale to 8, which convert would clip to white
            pixels = np.asarray(image, np.float32)
            image = Image.fromarray((pixels * (255 / max(pixels.max(), 1))).clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: image '{getattr(source, 'name', source)}' does not open ({error})") from error


def load_data(name, split="train", instruction=INSTRUCTION):
    """A sequence of Examples: 'digits', a folder (its sub-folder `split` if there is one), or a hub id.

    Returns None where a folder has no such split and is not asked for "train": there is nothing to evaluate on. Raises
    ValueError or ImportError with one sentence otherwise.
    """
    if name == "digits":
        return Digits(split)
    folder = Path(name)
    if folder.is_dir():
        if (folder / split).is_dir():
            return Folder(folder / split, instruction)
        return Folder(folder, instruction) if split == "train" else None
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"data '{name}' is unknown: give digits, an existing folder with metadata.jsonl, or a hub id OWNER/NAME")
    return Hub(name, {"val": "validation"}.get(split, split), instruction)


def example_at(dataset, position, seed):
    """The example at a run's `position` (0, 1, 2, ...): a fresh shuffle of the data set each epoch, keyed by (seed, epoch).

    An endless data set is read in order from a place that depends on the seed.
    """
    if len(dataset) >= 2**31:
        return dataset[(seed * 2**20 + position) % 2**30]
    epoch, i = divmod(position, len(dataset))
    return dataset[int(np.random.default_rng([seed, epoch]).permutation(len(dataset))[i])]
