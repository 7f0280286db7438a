"""From rows of a data set to prompts of a rollout batch: what can be used, what is left out and counted, who takes which.

Over-long prompts are left out as in the paper (Section 4); rows that cannot be used are an error that names them, or with
--skip_bad_rows left out, too.
"""

import sys

from tqdm import tqdm

import distributed
from data import example_at
from model import encode


class TooLong(ValueError):
    """A prompt of more than --max_prompt_tokens."""


def encode_checked(policy, example, cfg):
    """`model.encode` with the length limit; ValueError naming the row if it is exceeded or the processor refuses the example."""
    try:
        prompt = encode(policy.processor, example, cfg.system_prompt)
    except (ValueError, TypeError) as error:  # an image 1 x 300, an unpaired surrogate
        raise ValueError(f"{example.name}: {str(error).removeprefix(f'{example.name}: ')}") from error
    length = prompt["input_ids"].shape[1]
    if length > cfg.max_prompt_tokens:
        raise TooLong(f"{example.name}: prompt of {length} tokens exceeds --max_prompt_tokens {cfg.max_prompt_tokens}")
    return prompt


def usable(policy, get, places, cfg, left_out):
    """The examples get(i) of some places that make a prompt: [(i, example, prompt)]; `left_out` collects why others do not.

    left_out: {"prompts_too_long": [sentence], "bad_rows": [sentence]}. Over-long prompts are left out as in the paper (Section
    4); a row that cannot be used is an error, unless --skip_bad_rows leaves it out, too.
    """
    found = []
    for i in places:
        try:
            example = get(i)
            found.append((i, example, encode_checked(policy, example, cfg)))
        except TooLong as error:
            left_out["prompts_too_long"].append(str(error))
        except ValueError as error:
            if not cfg.skip_bad_rows:
                raise
            left_out["bad_rows"].append(str(error))
            tqdm.write(f"left out: {error}", file=sys.stderr)
    return found


def first_prompt(policy, get, places, cfg):
    """The prompt of the first place whose example get(i) makes one; with an image, if any of the first few has one."""
    left_out, text = {"prompts_too_long": [], "bad_rows": []}, None
    for number, i in enumerate(places):
        for _, example, prompt in usable(policy, get, [i], cfg, left_out):
            if example.images:
                return prompt
            text = text or prompt
        if text and number > 100:
            break
    if text:
        return text
    raise ValueError(f"none of the first {len(places)} prompts can be used, among them {max(left_out.values(), key=len)[0]}")


def fetch(policy, dataset, cfg, position, wanted, left_out):
    """This rank's next `wanted` prompts, [(position, example, prompt)], and the run's new position, the same on all ranks.

    Those left out are replaced by the next in line: each pass takes as many positions in a row as are missing over all ranks,
    so which ones a batch is made of does not depend on the number of ranks.
    """
    found, start = [], position
    while sum(missing := distributed.gather([wanted - len(found)])):
        if position - start > 1000 + 10 * cfg.prompts_per_step:
            last = distributed.gather([sentence for sentences in left_out.values() for sentence in sentences[-1:]])[-1]
            raise ValueError(f"of {position - start} prompts in a row not one in ten can be used, among them {last}")
        first = position + sum(missing[: distributed.rank()])
        mine = range(first, first + missing[distributed.rank()])
        found += usable(policy, lambda p: example_at(dataset, p, cfg.seed), mine, cfg, left_out)
        position += sum(missing)
    return found, position
