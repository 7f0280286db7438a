"""From an example to the tensors that a model reads, and which examples make up a rollout batch.

    Example     one row of a data set: images, a problem, the true answer
    encode      an example  -> a prompt: the processor's tensors for one row, not padded
    collate     prompts     -> one batch, padded on the left
    fetch       a position in the data -> the next prompts of this rank

A prompt that is too long is left out, as in the paper (Section 4). A row that cannot be used is an error that names it, or is left out
as well with --skip_bad_rows.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import distributed


@dataclass
class Example:
    """One row: what the policy sees (images, problem) and what the reward knows (answer)."""

    images: list  # PIL images, in the order of the <image> placeholders; none in a text-only row
    problem: str
    answer: str
    name: str = "example"  # where it comes from, for error messages: file and row
    kind: str = ""  # laptop tasks: "sum", "difference", "yesno" or "count"
    digits: tuple = ()  # laptop tasks: what the image really shows; of scenes a tuple per row
    asked: str = ""  # scenes task: the row that the problem names


# ---------------------------------------------------------------------------------------------------------------------
# Tensors
# ---------------------------------------------------------------------------------------------------------------------
def encode(processor, example, system=""):
    """One example as one prompt: the processor's tensors, not padded.

    `<image>` in the problem marks where an image goes; without a marker the images come first. Raises ValueError if markers
    and images do not match, OSError if the model has no chat template or it does not take the messages.
    """
    images = example.images
    pieces = example.problem.split("<image>")
    if len(pieces) == 1:
        pieces = [""] * len(images) + pieces
    if len(pieces) != len(images) + 1:
        raise ValueError(f"{example.name}: {len(pieces) - 1} <image> markers but {len(images)} images: make them equal")
    content = []
    for i, piece in enumerate(pieces):
        content += [{"type": "image"}] if i else []
        content += [{"type": "text", "text": piece}] if piece else []
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    messages.append({"role": "user", "content": content})
    tokenizer = processor.tokenizer
    template = processor.chat_template or tokenizer.chat_template
    if not template:
        raise OSError("the model has no chat template: take an instruction-tuned one")
    try:
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's folder
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"the model's chat template refuses the messages ({reason}): try --system_prompt ''") from error
    # Templates write the beginning-of-sequence token themselves; a tokenizer that adds one would make it two.
    special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    return dict(processor(text=[text], images=[images] if images else None, return_tensors="pt", add_special_tokens=special))


def with_images(processor, prompt, images):
    """The encoded prompt with other pictures of the same sizes (the masked ones): only the image part of the processor runs.

    images: PIL images in the prompt's order. Raises ValueError if they do not become tensors of the same shapes.
    """
    options = getattr(processor, "images_kwargs", {})  # what the processor itself passes on
    pictures = processor.image_processor([images], **options, return_tensors="pt") if images else {}
    new = {key: value for key, value in pictures.items() if key in prompt}
    if any(key in prompt and new[key].shape != prompt[key].shape for key in new) or (images and "pixel_values" not in new):
        raise ValueError("masked images must have the sizes of the true ones")
    return prompt | new


def append(batch, ids, mask):
    """A collated batch with more tokens at its end: (B, n) ids of plain text and their mask (token types of text are 0)."""
    tail = {"input_ids": ids, "attention_mask": mask}
    more = {key: tail.get(key, torch.zeros_like(ids)) for key in batch if is_per_token(batch, key)}
    return batch | {key: torch.cat([batch[key], value], dim=1) for key, value in more.items()}


def is_per_token(prompt, key):
    """True for tensors with one entry per token (ids, attention mask, token types); the others belong to the images."""
    return prompt[key].shape == prompt["input_ids"].shape and not prompt[key].is_floating_point()


def collate(prompts, copies=1, pad_id=0, device=None):
    """Prompts -> one batch of len(prompts) * copies rows, each prompt repeated `copies` times in a row.

    Per-token tensors are padded on the left (so that every response starts in the same column); image tensors, which Qwen
    models keep flat over patches and others one row per image, are concatenated, with zeros where their other sizes differ.
    """
    prompts = [prompt for prompt in prompts for _ in range(copies)]
    length = max(prompt["input_ids"].shape[1] for prompt in prompts)
    batch = {}
    for key in dict.fromkeys(key for prompt in prompts for key in prompt):
        owners = [prompt for prompt in prompts if key in prompt]  # a prompt without an image has no image tensors
        tensors = [prompt[key] for prompt in owners]
        if is_per_token(owners[0], key):
            fill = pad_id if key == "input_ids" else 0
            tensors = [torch.nn.functional.pad(t, (length - t.shape[1], 0), value=fill) for t in tensors]
        elif len({t.shape[1:] for t in tensors}) > 1:
            sizes = [max(size) for size in zip(*(t.shape[1:] for t in tensors))]
            tensors = [torch.nn.functional.pad(t, [p for n, m in zip(t.shape[:0:-1], sizes[::-1]) for p in (0, m - n)]) for t in tensors]
        batch[key] = torch.cat(tensors).to(device)
    return batch


# ---------------------------------------------------------------------------------------------------------------------
# Which examples
# ---------------------------------------------------------------------------------------------------------------------
def row_at(dataset, position, seed):
    """The row at a run's `position` (0, 1, 2, ...): a fresh shuffle of the data set each epoch, keyed by (seed, epoch).

    A stream is in such an order by itself. An endless data set is read in order from a place that depends on the seed.
    """
    if getattr(dataset, "length", 0) is None:
        return position
    if len(dataset) >= 2**31:
        return (seed * 2**20 + position) % 2**30
    epoch, i = divmod(position, len(dataset))
    return int(np.random.default_rng([seed, epoch]).permutation(len(dataset))[i])


def example_at(dataset, position, seed):
    """The example at a run's `position`."""
    return dataset[row_at(dataset, position, seed)]


LETTERS = 16  # more letters than this, on average, do not go into one token


class TooLong(ValueError):
    """A prompt of more than --max_prompt_tokens."""


class Unusable(ValueError):
    """What ends the run because of its data. All ranks raise it together, so they can still save together."""


def together(function):
    """function() on this rank. If it fails on any rank (a bad row, a data set out of reach), all ranks raise Unusable."""
    result, failure = None, None
    try:
        result = function()
    except (ValueError, OSError) as error:
        failure = error
    failures = distributed.gather([str(failure)] if failure else [])
    if failures:
        raise Unusable(failures[0]) from failure
    return result


def encode_checked(policy, example, cfg):
    """`encode` with the length limit; ValueError naming the row if it is exceeded or the processor refuses the example.

    A very long text is not cut into tokens at all, which could take minutes: no vocabulary makes a text of one token every LETTERS letters.
    """
    letters = len(example.problem)
    if letters > LETTERS * cfg.max_prompt_tokens:
        raise TooLong(f"{example.name}: problem of {letters:,} letters exceeds --max_prompt_tokens {cfg.max_prompt_tokens}")
    try:
        prompt = encode(policy.processor, example, cfg.system_prompt)
    except (ValueError, TypeError) as error:  # an image 1 x 300, an unpaired surrogate
        raise ValueError(f"{example.name}: {str(error).removeprefix(f'{example.name}: ')}") from error
    length = prompt["input_ids"].shape[1]
    if length > cfg.max_prompt_tokens:
        raise TooLong(f"{example.name}: prompt of {length} tokens exceeds --max_prompt_tokens {cfg.max_prompt_tokens}")
    return prompt


def usable(policy, dataset, rows, cfg, left_out):
    """The examples of some rows that make a prompt: [(row, example, prompt)]; `left_out` collects why others do not.

    left_out: {"prompts_too_long": [sentence], "bad_rows": [sentence]}. Over-long prompts are left out as in the paper (Section
    4); a row that cannot be used is an error, unless --skip_bad_rows leaves it out, too. What is found out about a row is kept with
    the data set: in the next epoch the row is neither read nor reported again.
    """
    found, known = [], getattr(dataset, "__dict__", {}).setdefault("left_out", {})  # row -> (reason, sentence)
    for row in rows:
        try:
            if row not in known:
                example = dataset[row]
                found.append((row, example, encode_checked(policy, example, cfg)))
        except TooLong as error:
            known[row] = "prompts_too_long", str(error)
        except ValueError as error:
            if not cfg.skip_bad_rows:
                raise
            known[row] = "bad_rows", str(error)
            tqdm.write(f"left out: {distributed.one_line(error)}", file=sys.stderr)
        if row in known:
            reason, sentence = known[row]
            left_out[reason].append(sentence)
    return found


def first_prompt(policy, dataset, rows, cfg):
    """The prompt of the first of some rows that makes one; with an image, if any of the first few has one."""
    left_out, text, seen = {"prompts_too_long": [], "bad_rows": []}, None, set()
    for row in rows:
        for _, example, prompt in usable(policy, dataset, [row] if row not in seen else [], cfg, left_out):
            if example.images:
                return prompt
            text = text or prompt
        seen.add(row)
        if text and len(seen) > 100:
            break
    if text:
        return text
    raise ValueError(f"none of the first {len(seen)} prompts can be used, among them {max(left_out.values(), key=len)[0]}")


def fetch(policy, dataset, cfg, position, wanted, left_out):
    """This rank's next `wanted` prompts, [(position, example, prompt)], and the run's new position, the same on all ranks.

    A prompt that is left out is replaced by the next in line. Each pass takes as many positions in a row as are missing over all
    ranks, so the prompts of a batch do not depend on the number of ranks.
    """
    found, begin = [], position
    while sum(missing := distributed.gather([wanted - len(found)])):
        if position - begin > 1000 + 10 * cfg.prompts_per_step:
            last = distributed.gather([sentence for sentences in left_out.values() for sentence in sentences[-1:]])[-1]
            raise Unusable(f"of {position - begin} prompts in a row not one in ten can be used, among them {last}")
        start = position + sum(missing[: distributed.rank()])  # the ranks take their positions one after the other
        mine = {p: row_at(dataset, p, cfg.seed) for p in range(start, start + missing[distributed.rank()])}

        def read():
            """The prompts at this rank's positions."""
            return [(p, *rest) for p, row in mine.items() for _, *rest in usable(policy, dataset, [row], cfg, left_out)]

        found += together(read)
        position += sum(missing)
    return found, position
