"""avg@k, pass@k and majority@k of any model on any data, with 95 % intervals; every response is kept.

    python eval.py --model runs/vppo-digits-0/checkpoints/step-000100 --data digits --samples 8
    torchrun --nproc_per_node=8 eval.py --model Qwen/Qwen2.5-VL-7B-Instruct --data FOLDER --max_new_tokens 2048
    python eval.py --model M --benchmark all --grader math-verify --prompts 0 --max_new_tokens 2048     see benchmarks.py
    python eval.py --model tiny --data digits --prompts 16 --report report.html     which tokens looked at the image?

avg@k: each prompt is answered k times (temperature 1, top-p 1, as in the paper, Section 4); the mean of all rewards.
pass@k: the share of prompts with at least one right answer among the k.
majority@k: the share of prompts where the answer most of the k responses give is right.
The intervals are clustered by prompt: the k answers to one prompt are no independent evidence, so the prompt is the unit.
"""

import json
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import benchmarks
import distributed
import report
from config import command_line, option
from data import INSTRUCTION, check_rows, load_data
from laptop import tiny
from model import Policy, load
from prompts import first_prompt, usable
from reward import MAX_LENGTH, check_grader, extract_answer, grade_example, normalise
from rollout import generate


@dataclass
class EvalConfig:
    """Flags of eval.py; the names are those of train.py where they mean the same."""

    model: str = option("tiny", "'tiny' or 'tiny-large' (warmed up, before RL), a checkpoint folder, or a hub id")
    data: str = option("digits", "'digits', 'scenes', a folder with metadata.jsonl or tables, a .jsonl or .parquet file, or a hub id")
    benchmark: str = option("", "the paper's, by name, or 'all': see benchmarks.py; --data is then a local copy")
    split: str = option("test", "train, val or test; a data set with a single split is taken whole")
    samples: int = option(8, "responses per prompt: the k of avg@k, pass@k and majority@k")
    prompts: int = option(512, "how many prompts, from the first; 0 takes all")
    max_new_tokens: int = option(48, "length limit of a response")
    temperature: float = option(1.0, "sampling temperature")
    top_p: float = option(1.0, "nucleus")
    max_prompt_tokens: int = option(4096, "longer prompts are left out and counted")
    system_prompt: str = option("You are a helpful assistant.", "system turn, if the chat template has one")
    problem_column: str = option("problem", "column of the question; <image> in it marks an image's place")
    answer_column: str = option("answer", "column of the true answer")
    images_column: str = option("images", "column of one image or a list; metadata.jsonl may also call it file_name(s)")
    instruction: str = option(INSTRUCTION, "appended to every problem of a folder, file or hub data set")
    min_pixels: int = option(0, "smaller images are enlarged to this area; 0 leaves them")
    max_pixels: int = option(0, "larger images are shrunk to this area; 0 leaves them")
    text_only: str = option("refuse", "a row without image: refuse (an error) or train (keep it)")
    skip_bad_rows: bool = option(False, "leave out and count rows that cannot be used, instead of an error")
    streaming: bool = option(False, "read the first rows of tables without downloading the others")
    grader: str = option("exact", "exact or math-verify; graded is the last \\boxed{} that closes")
    responses_at_once: int = option(1024, "responses in one call of generate: memory")
    dtype: str = option("float32", "float32 or bfloat16: of computing")
    seed: int = option(0, "of sampling")
    output: str = option("", "folder for responses.jsonl and eval.json; default MODEL/eval-DATA-SPLIT or runs/eval-...")
    report: str = option("", "also write this HTML page: what each token of the first few examples owes to the image")


def interval(per_prompt):
    """(mean, half width of its 95 % interval) over prompts: 1.96 standard errors, the prompt being the unit of evidence.

    The half width of a single prompt is None: one prompt says nothing about others.
    """
    n = len(per_prompt)
    return per_prompt.mean().item(), (1.96 * per_prompt.std().item() / n**0.5 if n > 1 else None)


def majority(texts, rewards):
    """The reward of the answer that most of the k responses to one prompt give: 1, 0 or, where answers tie, their mean.

    texts: k responses; rewards: their k rewards. Answers are one if `reward.normalise` writes them alike ("0.5", "1/2"); a
    response without a boxed answer has no vote, and without any vote the result is 0.

    Example: answers 1/2, 0.5, 7, 7, none; 7 is right: two votes each, so 1/2.
    """
    votes = {}  # answer -> the rewards of those who gave it
    for text, value in zip(texts, rewards):
        answer = (extract_answer(text) or "").strip()
        if answer := normalise(answer) if len(answer) <= MAX_LENGTH else answer:
            votes.setdefault(answer, []).append(value)
    most = max(map(len, votes.values()), default=0)
    winners = [value for values in votes.values() if len(values) == most for value in values]
    return sum(winners) / max(1, len(winners))


def evaluate(policy, dataset, cfg, prompts, samples, seed=0, progress="evaluation", with_ids=0, reward=None):
    """Answer the first `prompts` examples `samples` times each. Returns (scores, records), the same on every rank.

    cfg: a Config or EvalConfig. scores: {"avg", "avg_ci", "pass", "pass_ci", "majority", "majority_ci"}, and "left_out" where
    prompts are too long or, with --skip_bad_rows, unusable; records: one dict a prompt, in order, the first `with_ids` with
    "response_ids". The prompts are dealt out over the ranks; sampling is keyed by (seed, rank) and leaves the global generator
    as it was.
    """
    numbers = range(distributed.rank(), min(prompts or len(dataset), len(dataset)), distributed.world())
    records, left_out = [], {"prompts_too_long": [], "bad_rows": []}
    progress = progress if distributed.rank() == 0 else None
    with torch.random.fork_rng(devices=[policy.device] if policy.device.type == "cuda" else []), distributed.unsharded(policy):
        torch.manual_seed(seed * 1_009 + distributed.rank())
        for start in range(0, len(numbers), 512):  # whose images and prompts are in memory together
            found = usable(policy, dataset.__getitem__, numbers[start : start + 512], cfg, left_out)
            if not found:
                continue
            encoded = [prompt for *_, prompt in found]
            rollout = generate(
                policy, encoded, samples, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.responses_at_once, progress
            )
            for q, (number, example, _) in enumerate(found):
                texts = rollout.texts[q * samples : (q + 1) * samples]
                rewards = [float((reward or grade_example)(text, example, cfg)) for text in texts]
                records.append({"number": number, "name": example.name, "problem": example.problem, "answer": example.answer,
                                "kind": example.kind, "rewards": rewards, "responses": texts})  # fmt: skip
                if len(records) <= with_ids:  # of this rank: among them the first of all
                    rows = range(q * samples, (q + 1) * samples)
                    records[-1]["response_ids"] = [rollout.response_ids[i][rollout.response_mask[i]].tolist() for i in rows]
    records = sorted(distributed.gather(records), key=lambda record: record["number"])
    for record in records[with_ids:]:
        record.pop("response_ids", None)
    left_out = distributed.gather(left_out["prompts_too_long"] + left_out["bad_rows"])
    if not records:
        raise ValueError(f"no prompt to evaluate is left: {left_out[0]}")
    rewards = torch.tensor([record["rewards"] for record in records])  # (prompts, samples)
    average, average_ci = interval(rewards.mean(dim=1))
    passed, passed_ci = interval(rewards.amax(dim=1))
    voted, voted_ci = interval(torch.tensor([majority(record["responses"], record["rewards"]) for record in records]))
    scores = {"avg": average, "avg_ci": average_ci, "pass": passed, "pass_ci": passed_ci}
    scores |= {"majority": voted, "majority_ci": voted_ci}
    return scores | ({"left_out": len(left_out)} if left_out else {}), records


def describe(scores, samples):
    """The scores as one line of text."""
    names = ("avg", "pass", "majority")
    width = {name: "?" if scores[f"{name}_ci"] is None else f"{scores[f'{name}_ci']:.3f}" for name in names}
    gone = f"   ({scores['left_out']} prompts left out)" if scores.get("left_out") else ""
    return "   ".join(f"{name}@{samples} {scores[name]:.3f} +- {width[name]}" for name in names) + gone


def main(argv=None):
    """The command line."""
    cfg = EvalConfig(**vars(command_line(EvalConfig, __doc__).parse_args(argv)))
    check_grader(cfg.grader)
    if cfg.samples < 1 or cfg.prompts < 0 or cfg.max_new_tokens < 1 or cfg.temperature <= 0 or not 0 < cfg.top_p <= 1:
        others = "--prompts not be negative, --temperature be positive and --top_p be in (0, 1]"
        raise ValueError(f"--samples must be at least 1, --max_new_tokens too, {others}")
    if cfg.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype '{cfg.dtype}' is unknown: choose one of float32, bfloat16")
    check_rows(cfg)
    copy = "" if cfg.data == EvalConfig.data else cfg.data
    pixels = cfg.min_pixels, cfg.max_pixels
    sets = {name: benchmarks.load(name, copy, cfg.instruction, pixels) for name in benchmarks.named(cfg.benchmark)}
    dataset = next(iter(sets.values())) if sets else load_data(cfg.data, cfg.split, cfg, cfg.prompts, own=True)
    device = distributed.start()
    folder = tiny.ensure(model=cfg.model, data=cfg.data)[0] if cfg.model in tiny.NAMES and distributed.rank() == 0 else cfg.model
    folder = distributed.gather([folder])[0]
    policy = Policy(*load(folder, device), cfg.temperature, dtype=cfg.dtype)
    policy.check_sharing(first_prompt(policy, dataset.__getitem__, range(len(dataset)), cfg))
    base = Path(cfg.model) if Path(cfg.model).is_dir() else Path("runs")
    output = Path(cfg.output or base / ("eval-benchmarks" if sets else f"eval-{Path(cfg.data).name}-{cfg.split}"))
    if not sets:
        measure(policy, dataset, cfg, output)
    results = {}
    for name, dataset in sets.items():
        one = replace(cfg, data=name, split=benchmarks.BENCHMARKS[name].split)
        if cfg.report:  # a page each
            one.report = str(Path(cfg.report).with_stem(f"{Path(cfg.report).stem}-{name}"))
        results[name] = measure(policy, dataset, one, output / name)
        if distributed.rank() == 0:
            table = benchmarks.write(results, output)  # after each, for they take hours
    if sets and distributed.rank() == 0:
        print(f"\n{table}\n\n{output}/results.md, results.json")


def measure(policy, dataset, cfg, output):
    """Evaluate on one data set and write responses.jsonl and eval.json. Returns eval.json's content; None but on rank 0."""
    output.mkdir(parents=True, exist_ok=True)
    Path(cfg.report).parent.mkdir(parents=True, exist_ok=True)
    with_ids = report.EXAMPLES if cfg.report else 0
    scores, records = evaluate(policy, dataset, cfg, cfg.prompts, cfg.samples, cfg.seed, with_ids=with_ids)
    if distributed.rank():
        return
    with open(output / "responses.jsonl", "w") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
    result = {"model": cfg.model, "data": cfg.data, "split": cfg.split, "prompts": len(records), "samples": cfg.samples, **scores}
    (output / "eval.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"{describe(scores, cfg.samples)}   ({len(records)} prompts of {cfg.data}, {cfg.split}; responses in {output})")
    if cfg.report:
        heading = f"{cfg.model} on {cfg.data}, {cfg.split}: {describe(scores, cfg.samples)} ({len(records)} prompts)"
        page = report.page(policy, dataset, records[: report.EXAMPLES], cfg, heading)
        Path(cfg.report).write_text(page, encoding="utf-8", errors="xmlcharrefreplace")  # a lone surrogate is no UTF-8
        print(f"which tokens looked at the image: {cfg.report}")
    return result


MEMORY = "--responses_at_once, or add --dtype bfloat16"  # what to lower when it is too small


def run(main, name, memory_flags):
    """Run a script's main function and end the process: errors that the user can do something about as one sentence."""
    try:
        main()
    except torch.OutOfMemoryError as error:
        distributed.leave(f"{name}: out of memory: lower {memory_flags} ({str(error).splitlines()[0]})")
    except (ValueError, ImportError, OSError) as error:
        distributed.leave(f"{name}: {error}")
    except Exception:  # among them what a rank sees when another has died
        traceback.print_exc()
        distributed.leave(f"{name}: stopped by the error above")
    distributed.leave()


if __name__ == "__main__":
    run(main, "eval.py", MEMORY)
