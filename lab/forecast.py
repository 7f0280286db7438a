"""Before any training: which method will make more progress a step, on this model and these data? A forecast from gradients.

    python -m lab.forecast --model tiny --data digits                           a few minutes on one core
    python -m lab.forecast --model tiny --data scenes --groups 2000 --kinds     narrower intervals; and by kind of token
    torchrun --nproc_per_node=8 -m lab.forecast --config configs/FILE.json      a real model; --shard where one GPU is too small

The policy answers prompts as in training, and groups of equal rewards are dropped. A group's gradient by method m is g_m, that of
loss.policy_loss summed over its tokens, at ratio 1. (A divisor that all groups share cancels in every number below.) Its mean is mu_m,
and the trace of its covariance tr_m. DAPO's g is the *plain* gradient, with mean mu. Four numbers, each with a 95 % interval:

    noise scale   tr_m / |mu_m|^2, in groups: the gradient of so many is half noise (B_simple of arXiv 1812.06162)
    dropped       the share of the plain gradient's variance on tokens that m drops: 1 - cov(plain gradient of kept tokens, g) / tr
    cosine        of mu_m and mu: does m's mean gradient point where the plain one does?
    progress      E<g_batch, mu> / sqrt(E|g_batch|^2) = <mu_m, mu> / sqrt(|mu_m|^2 + tr_m / b), relative to DAPO's: how far a step of
                  length 1 along the gradient of b groups goes in the plain direction; b is --prompts_per_step

|mu_m|^2 and <mu_m, mu> are mean products of *different* blocks of groups, hence of other prompts, so they have no bias and may be
negative. Memory does not grow with the groups (lab/sketch.py). docs/forecast.md says how to read the tables.
"""

import json
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

import distributed
import loss
import vppo
from config import Config, as_words, check, command_line, numbered, option, read_fields
from data import load_source, sources
from lab import runs
from lab.sketch import SIZE, Tally, moments, sketch
from lab.variance import bootstrap
from laptop import tiny
from laptop.scenes import REGIMES
from model import Policy, freeze, load
from prompts import first_prompt, row_at
from reward import grade_example
from train import check_needs

# The first is what the others are compared with. Each is phase 3 of training (vppo.modulate) under these settings.
METHODS = {
    "DAPO": {"method": "dapo"}, "TAS": {"method": "tas"}, "TGF": {"method": "tgf"}, "VPPO": {"method": "vppo"},
    "80/20": {"method": "tgf", "select": "entropy", "k": 0.2, "soft": False},  # arXiv 2506.01939
    "random": {"method": "tgf", "select": "random", "soft": False},
}  # fmt: skip
SAME_TOKENS = {"TAS": "DAPO", "VPPO": "TGF"}  # methods that drop the tokens of another one, and also scale by alpha
KINDS = ["first words", "digits read", "numbers", "positions", "relations", "operators", "fillers"]
AT_ONCE = 4  # groups whose gradients are added up before they are squared: four times faster, and the mean loses nothing
PATIENCE = 256  # prompts without a group of different rewards before giving up
MEMORY = "--tokens_per_batch and --responses_at_once, or add --activation_checkpointing, --dtype bfloat16, --shard"  # what to lower


@dataclass
class Flags(Config):
    """Flags of lab/forecast.py: those of train.py, of which the ones about updates and evaluation change nothing, and two more."""

    output: str = option("", "folder for forecast.md and forecast.json; default runs/forecast-DATA-SEED")
    groups: int = option(400, "groups with different rewards to measure")
    kinds: bool = option(False, "a second table, by kind of token; for the laptop's tasks")


# ---------------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------------
def weights_of(batch, cfg, policy):
    """[(token weights (B, T), advantages (B,))] of METHODS, and with --kinds of KINDS, whose weights add up to DAPO's."""
    result = []
    for words in METHODS.values():
        vppo.modulate(batch, replace(cfg, **words))
        result.append((batch.token_mask, batch.advantages))
    if cfg.kinds:
        mask, tokenizer, task = batch.rollout.response_mask, policy.processor.tokenizer, tiny.task_of(cfg.data)
        numbers = torch.full(mask.shape, -1)
        for row, ids in enumerate(batch.rollout.response_ids):
            kinds = runs.token_kinds(task, [tokenizer.decode([i]) for i in ids[mask[row]]])
            numbers[row, : len(kinds)] = torch.tensor([KINDS.index(kind) for kind in kinds])
        result += [((numbers == k).to(mask.device), result[0][1]) for k in range(len(KINDS))]
    return result


def add_batch(tally, engine, batch, weights, cfg, done):
    """Count the gradients of a rollout batch: for AT_ONCE groups a forward pass, and a backward pass per method. Returns how many are done.

    The gradients of AT_ONCE groups come as their sum; `moments` knows that it stands for so many. Several ranks: each takes its own
    groups, on the bare policy. With --shard a forward pass needs all ranks, and so does a gradient, so the sum is one over AT_ONCE
    groups of every rank.
    """
    policy, rollout, mask = distributed.bare(engine), batch.rollout, batch.rollout.response_mask
    (blocks, size), unit = tally.sums.shape[1:], AT_ONCE * (distributed.world() if cfg.shard else 1)
    average, clip_high = cfg.recipe()
    mine = [q for q in range(len(batch.examples)) if mask[rollout.rows([q])].any()]  # a rank without groups has an empty one
    place = done + distributed.before(len(mine))  # the number of its first group, counted over all ranks
    for i in range(0, max(distributed.gather([len(mine)])), AT_ONCE):
        vectors, own = 0, mine[i : i + AT_ONCE]
        for prompts, rows, factor in distributed.passes(engine, rollout, own, cfg.tokens_per_batch, progress=None):
            logprobs, _ = engine(prompts, rollout.response_ids[rows], mask[rows], mask[rows])
            sketches = []
            for number, (token_mask, advantages) in enumerate(weights):
                value, _ = loss.policy_loss(
                    logprobs, logprobs, advantages[rows], mask[rows], token_mask[rows],
                    cfg.clip_low, clip_high, average=average, denominator=1)  # fmt: skip
                scale = factor * (distributed.world() if cfg.shard else 1)  # FSDP2 takes the mean of the ranks' gradients
                (scale * value).backward(retain_graph=number + 1 < len(weights))
                sketches.append(sketch(policy.parameters(), size, cfg.seed))
                policy.zero_grad()
            vectors = vectors + torch.stack(sketches)  # what is too large for one pass comes in pieces, and sketches add up
        groups, number = len(own), place + i
        if cfg.shard:
            torch.distributed.all_reduce(vectors)
            groups, number = distributed.total(groups), done
            done += groups
        if number < cfg.groups and groups and not (cfg.shard and distributed.rank()):
            tally.add(number // unit % blocks, vectors, groups)
    return done if cfg.shard else done + distributed.total(len(mine))


def measure(engine, data, cfg, reward=None, size=SIZE):
    """(tally, facts) of cfg.groups groups with different rewards, or of as many as there are; `facts` say what was sampled.

    Phases 1 to 3 of training, on rollout batches of cfg.prompts_per_step prompts. Eq. 5 compares the responses of such a batch.
    Raises ValueError if hardly any group has different rewards.
    """
    policy, sampling = distributed.bare(engine), replace(cfg, method="vppo", max_rounds=1)
    end = len(data) if getattr(data, "length", 0) is not None else sys.maxsize  # a stream has no length
    tally = Tally(len(METHODS) + len(KINDS) * cfg.kinds, size)
    done = position = number = prompts = earned = kept = 0
    bar = tqdm(total=cfg.groups, desc="groups", disable=None if distributed.rank() == 0 else True)
    while done < cfg.groups and (done or prompts < PATIENCE) and prompts < 16 * max(cfg.groups, PATIENCE):
        sampling.prompts_per_step = min(cfg.prompts_per_step, end - position)
        if sampling.prompts_per_step < distributed.world():
            break  # all of the data has been seen, and the same prompt again would be no other prompt
        torch.manual_seed(((cfg.seed * 1_000_003 + number) * 1_009 + distributed.rank()) % 2**63)
        with distributed.unsharded(policy):
            batch, position, metrics = vppo.collect(policy, data, sampling, position, reward or grade_example)
            if batch is not None:
                vppo.measure(policy, batch, sampling)
        number, prompts = number + 1, prompts + metrics["prompts_sampled"]
        earned += metrics["reward"] * metrics["prompts_sampled"]
        if batch is not None:
            weights = weights_of(batch, cfg, policy)
            masks = [token_mask[batch.rollout.response_mask].double() for token_mask, _ in weights]  # (tokens,) each
            masks += [mask * masks[list(METHODS).index("TGF")] for mask in masks[len(METHODS) :]]
            kept = kept + torch.stack(masks).sum(1).cpu()
            done = min(cfg.groups, add_batch(tally, engine, batch, weights, cfg, done))
            bar.update(done - bar.n)
    bar.close()
    tally = tally.gathered()
    if len(tally.counts[0]) < 2:
        words = f"of {prompts} prompts {done} had responses of different rewards"
        raise ValueError(f"--data {cfg.data} has too little signal for this model: {words}")
    kept = torch.tensor([distributed.total(number) for number in kept.tolist()])
    tokens, by_filter = kept[: len(tally.sums)], kept[len(tally.sums) :] / kept[len(METHODS) : len(tally.sums)].clamp(min=1)
    facts = {"groups": done, "prompts": prompts, "reward": earned / prompts, "kept": (tokens / tokens[0]).tolist()}
    return tally, facts | {"kept by TGF": dict(zip(KINDS, by_filter.tolist()))}  # empty without --kinds


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------
def estimates(tally, names, b, grams, counts):
    """{row: {quantity: (R,)}} for R ways to count the blocks: METHODS, behind them KINDS. The module's docstring has the formulas."""
    signal, align, trace, cov = moments(tally, grams, counts)  # each (M, R)

    def progress(align_m, signal_m, trace_m):
        """<mu_m, mu> / sqrt(|mu_m|^2 + tr_m / b), relative to the plain gradient's."""
        return align_m / signal[0] * ((signal[0] + trace[0] / b) / (signal_m + trace_m / b).clamp(min=1e-300)).sqrt()

    result = {}
    for m, name in enumerate(names):
        q = result[name] = {"signal / noise": signal[m] / trace[m], "variance / DAPO's": trace[m] / trace[0]}
        if name in METHODS:
            q["dropped"] = 1 - cov[names.index(SAME_TOKENS.get(name, name))] / trace[0]
            q["cosine"] = align[m] / (signal[m] * signal[0]).sqrt()  # nan where a mean square comes out negative
            q["progress"] = progress(align[m], signal[m], trace[m])
        else:  # shares, which over all kinds add up to 1; and g - g_m, the plain gradient of the other kinds
            q["variance"], q["alignment"] = cov[m] / trace[0], align[m] / signal[0]
            others = signal[0] - align[m], signal[0] - 2 * align[m] + signal[m], trace[0] - 2 * cov[m] + trace[m]
            q["progress without it"] = progress(*others)
    return result


def intervals(tally, b, replicates=2000):
    """{row: {quantity: [estimate, low, high]}}: 95 % percentiles over resampled blocks, the same blocks for all rows."""
    names, grams = [*METHODS, *KINDS][: len(tally.sums)], tally.grams()
    return bootstrap(lambda counts: estimates(tally, names, b, grams, counts), tally.sums.shape[1], replicates)


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------
UNTOLD = "cannot be told"


def cell(triple, told=True):
    """A table's cell: the estimate with its interval, or that it cannot be told."""
    return "{:z.2f} [{:z.2f}, {:z.2f}]".format(*triple) if told else UNTOLD


def noise_scale(triple):
    """The cell of tr / |mu|^2, from the interval of its inverse. Where that reaches down to 0, only a least noise scale is known."""
    estimate, low, high = triple
    if low > 0:
        return f"{1 / estimate:,.0f} [{1 / high:,.0f}, {1 / low:,.0f}]"
    return f"above {1 / high:,.0f}" if high > 0 else UNTOLD


def verdict(triple, signal):
    """What an interval of progress, as it is printed, says beside DAPO: "faster" or "slower"; nothing where DAPO's own signal may be 0."""
    low, high = round(triple[1], 2), round(triple[2], 2)
    return UNTOLD if signal[1] <= 0 or low <= 1 <= high else "faster" if low > 1 else "slower"


def needed(groups, triple, null, margin=0.0):
    """About how many groups keep an interval off `null` by `margin`, if the estimate stays: its width shrinks with their square root."""
    estimate, low, high = triple
    reach = estimate - low if estimate > null else high - estimate
    number = groups * (reach / max(abs(estimate - null) - margin, 1e-9)) ** 2
    return f"about {float(f'{number:.2g}'):,.0f}" if number < 100 * groups else f"more than {100 * groups:,}"


def sentences(e, groups, b):
    """What the intervals say, a sentence a finding."""
    signal = e["DAPO"]["signal / noise"]
    if signal[1] <= 0:
        more = f"{needed(groups, signal, 0)} groups would be needed" if signal[0] > 0 else "many more are needed"
        yield f"DAPO's own signal cannot be told from 0 with {groups:,} groups, so no progress can be predicted: {more}."
        return
    for name in list(METHODS)[1:]:
        progress = e[name]["progress"]
        told, times = verdict(progress, signal), f"{cell(progress)} times DAPO's in a step of {b} groups"
        if told == UNTOLD:
            more = f"{needed(groups, progress, 1, 0.005)} groups would be needed"
            yield f"Whether {name} progresses faster or slower than DAPO cannot be told: {times}; {more}."
        else:
            yield f"{name} is predicted to progress {told} than DAPO: {times}."


def table(*rows):
    """A markdown table; the first row is its head."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def report(e, facts, b):
    """The tables and sentences of forecast.md."""
    signal = e["DAPO"]["signal / noise"]
    methods = [["method", "tokens kept", "noise scale", "variance dropped", "cosine", "progress / DAPO's", "so it is"]]
    kinds = [["kind", "tokens", "TGF keeps", "variance", "alignment", "progress without it", "so without it DAPO is"]]
    for (name, q), share in zip(e.items(), facts["kept"]):
        if name in METHODS:
            known = min(signal[1], q["signal / noise"][1]) > 0
            words = noise_scale(q["signal / noise"]), cell(q["dropped"]), cell(q["cosine"], known), cell(q["progress"], signal[1] > 0)
            methods.append([name, f"{share:.2f}", *words, verdict(q["progress"], signal) if name != "DAPO" else "the measure"])
        else:
            words = cell(q["variance"]), *(cell(q[key], signal[1] > 0) for key in ("alignment", "progress without it"))
            shares = f"{share:.2f}", f"{facts['kept by TGF'][name]:.2f}"
            kinds.append([name, *shares, *words, verdict(q["progress without it"], signal)])
    parts = [f"{facts['groups']:,} groups with different rewards, from {facts['prompts']:,} prompts of mean reward {facts['reward']:.2f}. "
             f"In brackets 95 % intervals. Noise scale in groups; progress in a step of {b} groups.", table(*methods)]  # fmt: skip
    parts.append("\n".join(f"* {sentence}" for sentence in sentences(e, facts["groups"], b)))
    if len(kinds) > 1:
        parts += ["By kind of token: shares of the plain gradient, and DAPO's progress if the kind is left out.", table(*kinds)]
    return "\n\n".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------
def parse(argv):
    """The command line -> Flags, checked. Raises ValueError of one sentence."""
    parser = command_line(Flags, __doc__)
    parser.add_argument("--config", help="JSON file with any of train.py's fields; flags override it")
    flags = parser.parse_args(argv)
    if flags.config is not None:
        flags = parser.parse_args(as_words(read_fields(flags.config, "--config")) + argv)
    cfg = Flags(**{field.name: getattr(flags, field.name) for field in fields(Flags)})
    check(cfg)
    check_needs(cfg)
    if not 16 <= cfg.groups <= 10**6:
        raise ValueError(f"--groups must be from 16 to 1,000,000, got {cfg.groups}")
    if cfg.kinds and cfg.data not in ("digits", *REGIMES):
        raise ValueError(f"--kinds knows the words of the laptop's tasks only, and not those of --data {cfg.data}: leave it out")
    return cfg


def main(argv=None, *, reward=None):
    """The command line: measure, print the tables, write them. reward: a function of your own, as in train.main."""
    argv, begin = sys.argv[1:] if argv is None else list(argv), time.time()
    cfg = parse(argv)
    data, device = load_source(sources(cfg)[0], cfg), distributed.start(cfg.device)
    if cfg.shard and distributed.world() == 1:
        raise ValueError("--shard needs processes to split the model over: torchrun --nproc_per_node=N -m lab.forecast --shard")
    folder = distributed.gather([runs.weights(cfg.model, cfg.data) if distributed.rank() == 0 else None])[0]
    torch.manual_seed(cfg.seed)
    place = "cpu" if cfg.shard else device
    parts = load(folder, place, attention=cfg.attn_implementation, lora_rank=cfg.lora_rank, dtype=cfg.dtype)
    policy = Policy(*parts, cfg.temperature, cfg.share_prompt, cfg.dtype, cfg.static_cache).train()
    if cfg.freeze:
        freeze(policy.model, cfg.freeze)
    if cfg.activation_checkpointing:
        policy.model.activation_checkpointing_enable()
    engine = distributed.engine(policy, True) if cfg.shard else policy
    with distributed.unsharded(policy):
        sharing = policy.check_sharing(first_prompt(policy, data, (row_at(data, i, cfg.seed) for i in range(1000)), cfg))
    tally, facts = measure(engine, data, cfg, reward)
    if distributed.rank():
        return None
    e, command = intervals(tally, cfg.prompts_per_step), " ".join(["python -m lab.forecast", *argv])
    output = Path(cfg.output or next(x for x in numbered(f"runs/forecast-{Path(cfg.data).name}-{cfg.seed}") if not x.exists()))
    output.mkdir(parents=True, exist_ok=True)
    facts |= {"command": command, "commit": runs.commit(), "torch": torch.__version__, "ranks": distributed.world(),
              "seconds": round(time.time() - begin, 1), "prompts_per_step": cfg.prompts_per_step, "sharing": sharing}  # fmt: skip
    text = report(e, facts, cfg.prompts_per_step)
    (output / "forecast.md").write_text(f"# Forecast for {cfg.model} on {cfg.data}\n\n    {command}\n\n{text}\n")
    rows = {name: {key: [x if x == x else None for x in triple] for key, triple in q.items()} for name, q in e.items()}  # nan is no JSON
    (output / "forecast.json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    print(f"{text}\n\n{facts['seconds']:.0f} s; everything is in {output}")
    return e


if __name__ == "__main__":
    distributed.run(main, "lab.forecast", MEMORY)
