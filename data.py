"""Examples: an image (or several), a problem, the true answer; and the data sets they come from.

`digits` and `scenes` are the laptop's tasks (digits.py, scenes.py). Anything else is a folder in Hugging Face's ImageFolder layout, or a hub id read through
the `datasets` package.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# What the paper appends to every question (Section 4): think first, then a boxed answer that a program can find.
INSTRUCTION = (
    "Think about the question first and write your reasoning inside <think> </think>. "
    "Then give the final answer in \\boxed{}."
)


@dataclass
class Example:
    """One row: what the policy sees (images, problem) and what the reward knows (answer)."""

    images: list  # PIL images, in the order of the <image> placeholders
    problem: str
    answer: str
    name: str = "example"  # where it comes from, for error messages: file and row
    kind: str = ""  # laptop tasks: "sum", "difference", "yesno" or "count"
    digits: tuple = ()  # laptop tasks: what the image really shows; of scenes a tuple per row
    asked: str = ""  # scenes task: the row that the problem names


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
    """A sequence of Examples: 'digits', 'scenes', a folder (its sub-folder `split` if there is one), or a hub id.

    Returns None where a folder has no such split and is not asked for "train": there is nothing to evaluate on. Raises
    ValueError or ImportError with one sentence otherwise.
    """
    if name == "digits":
        from digits import Digits  # which needs Example from here

        return Digits(split)
    if name == "scenes":
        from scenes import Scenes

        return Scenes(split)
    folder = Path(name)
    if folder.is_dir():
        if (folder / split).is_dir():
            return Folder(folder / split, instruction)
        return Folder(folder, instruction) if split == "train" else None
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"data '{name}' is unknown: give digits, scenes, an existing folder with metadata.jsonl, or a hub id OWNER/NAME")
    return Hub(name, {"val": "validation"}.get(split, split), instruction)


def example_at(dataset, position, seed):
    """The example at a run's `position` (0, 1, 2, ...): a fresh shuffle of the data set each epoch, keyed by (seed, epoch).

    An endless data set is read in order from a place that depends on the seed.
    """
    if len(dataset) >= 2**31:
        return dataset[(seed * 2**20 + position) % 2**30]
    epoch, i = divmod(position, len(dataset))
    return dataset[int(np.random.default_rng([seed, epoch]).permutation(len(dataset))[i])]
