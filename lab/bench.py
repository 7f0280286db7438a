"""How fast is a step, and where does its time go? Everything as ratios measured in one run, for machines are noisy.

    python -m lab.bench --json out.json                       the table of docs/speed.md, on the laptop's model; with trl if installed
    python -m lab.bench --shape qwen2.5-vl-3b --image_tokens 1000 --response_tokens 512       real dimensions, for a GPU

The *plain* path repeats a prompt for each of its G responses, as most code does; the *shared* path runs it once. Each comparison
runs its sides in turn, several times; the ratio printed is the median of the ratios, with their smallest and largest.
A rollout batch is used for two updates, as train.py does by default and, on its side, trl with steps_per_generation = 2.
Responses have full length (the end token is never sampled) and pseudo-random rewards, so that every run does the same work. Three lines
are about responses of *real lengths*: most are short and a few reach the limit, so padding costs most. Both sides get the same lengths.
"""

import contextlib
import copy
import importlib.util
import itertools
import json
import statistics
import sys
import tempfile
import time
import warnings
import weakref
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText, GenerationMixin

import dryrun
from config import METHODS, Config, command_line, option
from dependency import score_tokens
from laptop import tiny
from model import Policy
from prompts import Example
from vppo import collect, deal, measure, modulate, train_step, update

SHAPES = {"tiny": None, "qwen2.5-vl-3b": "3B", "qwen2.5-vl-7b": "7B"}  # names in dryrun.MODELS
VOCABULARY = 151_936  # of Qwen2.5-VL: what makes logits dear


@dataclass
class BenchConfig:
    """Flags of lab/bench.py."""

    shape: str = option("tiny", "tiny, qwen2.5-vl-3b or qwen2.5-vl-7b: dimensions of the model, with random weights")
    method: str = option("vppo", "the method of the table of phases")
    prompts: int = option(16, "Q, prompts per step")
    group_size: int = option(8, "G, responses per prompt")
    image_tokens: int = option(64, "visual tokens per prompt")
    response_tokens: int = option(48, "tokens per response")
    tokens_per_batch: int = option(16384, "tokens in one forward pass")
    repeats: int = option(5, "how often each comparison is made")
    peer: str = option("trl", "trl: its GRPOTrainer too, if it is installed; none")
    json: str = option("", "file for the results")


# ---------------------------------------------------------------------------------------------------------------------
# Models, prompts, steps
# ---------------------------------------------------------------------------------------------------------------------
def build(shape="tiny", device="cpu", **text):
    """A Policy of a shape with random weights. `text` overrides fields of the tiny model's text config."""
    processor = tiny.build_processor()
    processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 4096}
    config = tiny.build_model(processor, **tiny.RECIPE).config
    if SHAPES[shape]:
        real, _ = dryrun.qwen(**dryrun.MODELS[SHAPES[shape]])
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            setattr(real, name, getattr(config, name))
        config = real
    for name, value in text.items():
        setattr(config.text_config, name, value)
    config.vision_config.out_hidden_size = config.text_config.hidden_size
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config)
    policy = Policy(model, processor, dtype="bfloat16" if device == "cuda" else "float32").train()
    policy.forbidden = sorted({*policy.forbidden, *policy.eos_ids})  # responses of full length
    return policy


def questions(number, image_tokens):
    """Examples with one noise image of so many visual tokens (28 x 28 pixels each, the sides as equal as they divide)."""
    rng = np.random.default_rng(0)
    height = max(n for n in range(1, int(image_tokens**0.5) + 1) if image_tokens % n == 0)
    size = (28 * height, 28 * (image_tokens // height), 3)
    pictures = [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for _ in range(number)]
    return [Example([picture], "what is the first digit plus the last ?", "1") for picture in pictures]


def checksum_reward(text, example=None, cfg=None):
    """1 for half of all texts, so that nearly every group has a signal."""
    return float(zlib.crc32(text.encode()) % 2)


def settings(bench, method, **fields):
    """The Config of one step: one round of sampling, two updates as in train.py."""
    sizes = dict(prompts_per_step=bench.prompts, group_size=bench.group_size, max_new_tokens=bench.response_tokens)
    common = dict(updates_per_rollout=2, max_rounds=1, lr=1e-6, tokens_per_batch=bench.tokens_per_batch)
    return Config(method=method, **sizes, **common | fields)


def lognormal(number, mean, limit, seed=0):
    """Lengths of responses as a model writes them: lognormal, cut at `limit`, with the given mean after that."""
    draws = np.exp(np.random.default_rng(seed).normal(size=number) * 0.9)
    scale = 1.0
    for _ in range(50):
        scale *= mean / np.clip(draws * scale, 1, limit).mean()
    return np.clip(draws * scale, 1, limit).round().astype(int).tolist()


@contextlib.contextmanager
def real_lengths(policy, lengths):
    """Inside, every call of `generate` ends its row i with the end token at length lengths[i], whether we or trl call it.

    The end token may be scored here, for it is sampled. Elsewhere in this file it is forbidden.
    """
    honest, forbidden, lengths = GenerationMixin.generate, policy.forbidden, torch.tensor(lengths, device=policy.device)

    def generate(model, *words, logits_processor=(), **named):
        number = itertools.count(1)

        def end_there(ids, scores):
            """A logits processor, called once a token: the end token is certain where a row shall end, and impossible before."""
            here = lengths == next(number)
            scores[:, policy.eos_ids] = -torch.inf
            scores[here] = -torch.inf
            scores[here, policy.eos_ids[0]] = 0
            return scores

        return honest(model, *words, logits_processor=[*logits_processor, end_there], **named)

    GenerationMixin.generate, policy.forbidden = generate, [i for i in forbidden if i not in policy.eos_ids]
    try:
        yield
    finally:
        GenerationMixin.generate, policy.forbidden = honest, forbidden


def counted(policy, action):
    """How many tokens go through the first decoder layer while an action runs."""
    tokens = []
    layer = policy.model.get_decoder().layers[0]
    hook = layer.register_forward_pre_hook(lambda _, words: tokens.append(words[0].shape[0] * words[0].shape[1]))
    action()
    hook.remove()
    return sum(tokens)


def clock():
    """Seconds; on a GPU, after everything queued is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(action):
    """Seconds an action takes."""
    start = clock()
    action()
    return clock() - start


def in_turn(repeats, **actions):
    """Run the actions in turn, `repeats` times after one for warming up; {name: [seconds]}."""
    for action in actions.values():
        action()
    rounds = [{name: timed(action) for name, action in actions.items()} for _ in range(repeats)]
    return {name: [seconds[name] for seconds in rounds] for name in actions}


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------
def storages(tree, axes=0):
    """The memory behind each tensor of at least so many axes in nested lists, tuples and dicts."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.dim() >= axes]


class LivingTensors(TorchDispatchMode):
    """Counts the bytes of living tensors that were made inside (`alive`), their `peak`, and the `largest` one; on any device.

    axes: leave out tensors of fewer axes. Keys and values have four: (B, heads, tokens, head size).
    """

    def __init__(self, axes=0):
        super().__init__()
        self.axes = axes
        self.alive = self.peak = self.largest = 0
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run the operation, then note the new memory among its results; a view shares memory that was noted before."""
        known = {storage._cdata for storage in storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in storages(result, self.axes):
            if storage._cdata not in self.seen | known:
                self.seen.add(storage._cdata)
                self.alive += storage.nbytes()
                self.peak, self.largest = max(self.peak, self.alive), max(self.largest, storage.nbytes())
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return result

    def forget(self, key, size):
        """A tensor's memory is free again."""
        self.seen.discard(key)
        self.alive -= size


def peak_memory(action, axes=0):
    """Bytes of new tensors alive at once while an action runs; of those with at least so many axes."""
    with LivingTensors(axes) as living:
        action()
    return living.peak


# ---------------------------------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------------------------------
def phases(policy, bench, examples, share):
    """{phase: (median seconds, peak GiB)} of one step: generate, score, masked score, update; each alone."""
    policy.share_prompt = share
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0)
    full, plain = settings(bench, bench.method), settings(bench, "dapo")
    batch, _, _ = collect(policy, examples, plain, 0, checksum_reward)
    ready = copy.copy(batch)
    measure(policy, ready, full)
    modulate(ready, full)
    actions = {
        "generate": lambda: collect(policy, examples, plain, 0, checksum_reward),
        "score": lambda: measure(policy, copy.copy(batch), plain),
        "both scores": lambda: measure(policy, copy.copy(batch), full),
        "update": lambda: [update(policy, optimizer, ready, groups, full) for groups in deal(ready, full)],
    }
    seconds = {name: statistics.median(times) for name, times in in_turn(bench.repeats, **actions).items()}
    peaks = {name: peak_memory(action) / 2**30 for name, action in actions.items()}
    seconds["masked score"] = max(0.0, seconds.pop("both scores") - seconds["score"])
    peaks["masked score"] = peaks.pop("both scores")
    if not (full.has("tgf") or full.has("tas")):
        seconds["masked score"] = peaks["masked score"] = 0.0
    return {name: (seconds[name], peaks[name]) for name in ("generate", "score", "masked score", "update")}


def steps(policy, bench, examples):
    """{name: a function that takes one whole step}, for VPPO and DAPO, shared and plain."""
    optimizer = torch.optim.AdamW(policy.parameters())

    def step(method, share):
        policy.share_prompt = share
        train_step(policy, optimizer, examples, settings(bench, method, share_prompt=share), 0, 0, reward=checksum_reward)

    pairs = [("vppo", True), ("dapo", True), ("dapo", False)]
    return {f"{method} {'shared' if share else 'plain'}": lambda m=method, s=share: step(m, s) for method, share in pairs}


def learning(policy, bench, examples, share, mask=None):
    """A function that scores, scores masked and updates from saved rollouts. With `mask` it only updates.

    mask: "tgf" keeps the tokens of Eq. 4, "all" keeps every token.
    """
    policy.share_prompt = share
    cfg = settings(bench, "vppo")
    batch, _, _ = collect(policy, examples, cfg, 0, checksum_reward)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0)
    measure(policy, batch, cfg)
    modulate(batch, cfg)
    if mask == "all":
        batch.token_mask = batch.rollout.response_mask

    def action():
        policy.share_prompt = share
        if mask is None:
            return passes(policy, optimizer, batch, cfg)
        for groups in deal(batch, cfg):
            update(policy, optimizer, batch, groups, cfg)

    return action


def passes(policy, optimizer, batch, cfg):
    """All of a step but the rollout."""
    measure(policy, batch, cfg)
    modulate(batch, cfg)
    for groups in deal(batch, cfg):
        update(policy, optimizer, batch, groups, cfg)


def ratios(above, below):
    """(median, smallest, largest) of ratios taken pair by pair."""
    values = [a / b for a, b in zip(above, below)]
    return statistics.median(values), min(values), max(values)


def line(name, ratio, at_most=None):
    """One line of the table, printed as soon as it is known. at_most: the aim, if there is one."""
    median, low, high = ratio
    reached = "-" if at_most is None else "yes" if median <= at_most else "NO"
    print(f"| {name} | {median:.3f} | {low:.3f} - {high:.3f} | {at_most or '-'} | {reached} |", flush=True)
    return {"name": name, "ratio": round(median, 4), "low": round(low, 4), "high": round(high, 4), "at_most": at_most}


def padding(policy, bench, examples):
    """Tokens computed / real tokens, counted: those of scoring, masked scoring and both updates of one rollout batch."""
    cfg = settings(bench, "vppo")
    batch, _, _ = collect(policy, examples, cfg, 0, checksum_reward)
    real = sum(prompt["input_ids"].shape[1] for prompt in batch.rollout.prompts) + int(batch.rollout.response_mask.sum())
    computed = counted(policy, lambda: passes(policy, torch.optim.AdamW(policy.parameters(), lr=0.0), batch, cfg))
    return (computed / (3 * real),) * 3  # each token is scored, scored masked, and in one of the two updates


def scoring_memory():
    """Peak memory of scoring 8 x 256 tokens from hidden states: chunk by chunk, over everything at once."""
    head = torch.nn.Linear(256, VOCABULARY, bias=False)
    states, masked = torch.randn(2, 8 * 256, 256)
    ids = torch.randint(VOCABULARY, (8 * 256,))

    def at_once():
        logp, logq = head(states).log_softmax(-1), head(masked).log_softmax(-1)
        return logp.gather(1, ids[:, None]), (logp.exp() * (logp - logq)).sum(-1), (logp.exp() * logp).sum(-1)

    with torch.no_grad():
        chunked = peak_memory(lambda: score_tokens(lambda x: head(x).float(), states, masked, ids))
        return (chunked / peak_memory(at_once),) * 3


def peer(policy, bench, examples, ours):
    """[seconds of a step of trl's GRPOTrainer], [seconds of ours], in turn: same model, images, lengths, two updates, no KL term.

    trl's time is that of two `training_step`s, the first of which also samples and scores; its optimizer is left out. Ours is the
    whole step.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = [{"prompt": [{"role": "user", "content": example.problem}], "images": example.images} for example in examples]
    generation = dict(min_new_tokens=bench.response_tokens, suppress_tokens=policy.forbidden, top_k=0, top_p=1.0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=bench.prompts * bench.group_size // 2, steps_per_generation=2, num_generations=bench.group_size,
            max_completion_length=bench.response_tokens, max_steps=2 * (bench.repeats + 1), learning_rate=1e-6, beta=0.0, num_iterations=1,
            generation_kwargs=generation, gradient_checkpointing=False, report_to=[], save_strategy="no", logging_strategy="no",
            use_cpu=not torch.cuda.is_available(), bf16=policy.compute_dtype == torch.bfloat16, disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=copy.deepcopy(policy.model), processing_class=policy.processor, args=arguments,
            reward_funcs=lambda completions, **_: [checksum_reward(str(c)) for c in completions],
            train_dataset=Dataset.from_list(rows),
        )  # fmt: skip
        theirs, mine, original = [], [], trainer.training_step

        def training_step(*words, **named):
            start = clock()
            result = original(*words, **named)
            theirs.append(clock() - start)
            if len(theirs) % 2 == 0:  # both updates of a rollout batch are made
                mine.append(timed(ours))
            return result

        trainer.training_step = training_step
        trainer.train()
    both = [first + second for first, second in zip(theirs[::2], theirs[1::2])]
    return both[1:], mine[1:]  # the first is for warming up


def with_trl(policy, bench, examples, ours):
    """The ratio of our step to trl's, or None where trl is not installed or not asked for."""
    if bench.peer != "trl" or not importlib.util.find_spec("trl"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, mine = peer(policy, bench, examples, ours)
    return ratios(mine, theirs)


def lines_of_real_lengths(policy, bench):
    """The lines with lognormal lengths: 64 image tokens, a limit of 192 response tokens, which are 48 on average, 16 prompts x 8."""
    bench = BenchConfig(response_tokens=192, repeats=bench.repeats, peer=bench.peer)
    examples, words = questions(64, bench.image_tokens), "lognormal lengths, mean 48 of at most 192"
    with real_lengths(policy, lognormal(bench.prompts * bench.group_size, bench.response_tokens / 4, bench.response_tokens)):
        if ratio := with_trl(policy, bench, examples, steps(policy, bench, examples)["vppo shared"]):
            yield line(f"VPPO step / trl GRPOTrainer step: {words}", ratio, 0.30)
        pair = {name: learning(policy, bench, examples, name == "shared") for name in ("shared", "plain")}
        times = in_turn(bench.repeats, **pair)
        yield line(f"score + masked score + update, shared / plain: {words}", ratios(times["shared"], times["plain"]))
        policy.share_prompt = True
        yield line(f"tokens computed / real tokens in these passes, counted, shared: {words}", padding(policy, bench, examples), 1.3)


def bar(parts, scale):
    """A row of letters, one per `scale` seconds: g generate, s score, m masked score, u update."""
    return "".join(name[0] * round(seconds / scale) for name, (seconds, _) in parts.items())


def main(argv=None):
    """The command line."""
    bench = BenchConfig(**vars(command_line(BenchConfig, __doc__).parse_args(argv)))
    for name, allowed in (("shape", SHAPES), ("method", METHODS), ("peer", ("trl", "none"))):
        if getattr(bench, name) not in allowed:
            raise ValueError(f"--{name} '{getattr(bench, name)}' is unknown: choose one of {', '.join(allowed)}")
    if bench.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {bench.repeats}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    examples = questions(64, bench.image_tokens)
    policy = build(bench.shape, device)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{bench.shape}, {bench.image_tokens} image tokens, {bench.response_tokens} response tokens, "
          f"{bench.prompts} prompts x {bench.group_size}, {where}\n")  # fmt: skip

    # Where a step's time goes
    tables = {share: phases(policy, bench, examples, share) for share in (False, True)}
    scale = sum(seconds for seconds, _ in tables[False].values()) / 80
    result = {"machine": where, "settings": vars(bench), "phases": {}, "lines": []}
    print(f"| {bench.method} | " + " | ".join(tables[True]) + " | together |\n" + "|---" * 6 + "|")
    for share, table in tables.items():
        total = sum(seconds for seconds, _ in table.values())
        cells = [f"{seconds:.3f} s, {peak:.2f} GiB" for seconds, peak in table.values()]
        print(f"| {'shared' if share else 'plain'} | {' | '.join(cells)} | {total:.3f} s |")
        result["phases"]["shared" if share else "plain"] = {n: {"seconds": s, "peak_gib": p} for n, (s, p) in table.items()}
    print(f"\n    plain   {bar(tables[False], scale)}\n    shared  {bar(tables[True], scale)}\n")

    # Ratios
    print("| what | ratio | range | at most | reached |\n|---|---|---|---|---|")
    lines = result["lines"]
    actions = steps(policy, bench, examples)
    if device == "cuda":
        times = in_turn(bench.repeats, **{name: actions[name] for name in ("vppo shared", "dapo shared")})
        lines.append(line("VPPO step / DAPO step, both shared", ratios(times["vppo shared"], times["dapo shared"]), 1.05))
        tokens = bench.prompts * bench.group_size * bench.response_tokens / statistics.median(times["vppo shared"])
        result["response_tokens_per_second"], result["peak_gpu_gib"] = tokens, torch.cuda.max_memory_allocated() / 2**30
        print(f"\n{tokens:.0f} response tokens a second in a whole VPPO step, peak {result['peak_gpu_gib']:.1f} GiB")
    else:
        if ratio := with_trl(policy, bench, examples, actions["vppo shared"]):
            lines.append(line("VPPO step / trl GRPOTrainer step", ratio, 0.33))
        times = in_turn(bench.repeats, **actions)
        lines.append(line("VPPO step shared / DAPO step plain", ratios(times["vppo shared"], times["dapo plain"]), 0.45))
        extra = [a - b for a, b in zip(times["vppo shared"], times["dapo shared"])]
        lines.append(line("(VPPO - DAPO, both shared) / DAPO step plain", ratios(extra, times["dapo plain"]), 0.08))
        large = BenchConfig(prompts=4, image_tokens=256, response_tokens=64)
        pair = {name: learning(policy, large, questions(8, 256), name == "shared") for name in ("shared", "plain")}
        times = in_turn(bench.repeats, **pair)
        name = "score + masked score + update, shared / plain: 256 image tokens, 64 response tokens, G = 8"
        lines.append(line(name, ratios(times["shared"], times["plain"]), 0.28))
        policy.model.activation_checkpointing_enable()
        pair = {name: learning(policy, large, questions(8, 256), name == "packed") for name in ("packed", "plain")}
        times = in_turn(bench.repeats, **pair)
        policy.model.activation_checkpointing_disable()
        lines.append(line("the same with activation checkpointing, packed / plain", ratios(times["packed"], times["plain"]), 1.0))
        wide = build(hidden_size=256, num_attention_heads=8, num_key_value_heads=8, vocab_size=VOCABULARY)
        small = BenchConfig(prompts=4, image_tokens=64, response_tokens=64)
        pair = {name: learning(wide, small, questions(8, 64), True, name) for name in ("tgf", "all")}
        times = in_turn(bench.repeats, **pair)
        name = f"update of TGF, k = 0.4 / update over all tokens, both shared: V = {VOCABULARY:,}, hidden 256"
        lines.append(line(name, ratios(times["tgf"], times["all"]), 0.55))
        name = f"peak memory of scoring, chunked / all at once: V = {VOCABULARY:,}, B = 8, T = 256"
        lines.append(line(name, scoring_memory(), 0.15))
        lines += lines_of_real_lengths(policy, bench)
    if bench.json:
        Path(bench.json).write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"lab.bench: {error}")
