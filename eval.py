"""avg@k and pass@k of any model on any data, with 95 % intervals; every response is kept.

    python eval.py --model runs/vppo-digits-0/checkpoints/step-000100 --data digits --samples 8
    torchrun --nproc_per_node=8 eval.py --model Qwen/Qwen2.5-VL-7B-Instruct --data FOLDER --max_new_tokens 2048

avg@k: each prompt is answered k times (temperature 1, top-p 1, as in the paper, Section 4); the mean of all rewards.
pass@k: the share of prompts with at least one right answer among the k.
The intervals are clustered by prompt: the k answers to one prompt are no independent evidence, so the prompt is the unit.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

import distributed
import reward
import tiny
from data import INSTRUCTION, load_data
from model import Policy, load
from rollout import generate
from vppo import command_line, encode_checked, option


@dataclass
class EvalConfig:
    """Flags of eval.py; the names are those of train.py where they mean the same."""

    model: str = option("tiny", "'tiny' or 'tiny-large' (warmed up, before RL), a checkpoint folder, or a hub id")
    data: str = option("digits", "'digits', 'scenes', a folder with metadata.jsonl and images, or a hub id")
    split: str = option("test", "train, val or test")
    samples: int = option(8, "responses per prompt: the k of avg@k and pass@k")
    prompts: int = option(512, "how many prompts, from the first; 0 takes all")
    max_new_tokens: int = option(48, "length limit of a response")
    temperature: float = option(1.0, "sampling temperature")
    top_p: float = option(1.0, "nucleus")
    max_prompt_tokens: int = option(4096, "a longer prompt is an error")
    system_prompt: str = option("You are a helpful assistant.", "system turn, if the chat template has one")
    instruction: str = option(INSTRUCTION, "appended to every problem of a folder or hub data set")
    grader: str = option("exact", "exact or math-verify")
    responses_at_once: int = option(1024, "responses in one call of generate: memory")
    seed: int = option(0, "of sampling")
    output: str = option("", "folder for responses.jsonl and eval.json; default MODEL/eval-DATA-SPLIT or runs/eval-...")


def interval(per_prompt):
    """(mean, half width of its 95 % interval) over prompts: 1.96 standard errors, the prompt being the unit of evidence.

    The half width of a single prompt is None: one prompt says nothing about others.
    """
    n = len(per_prompt)
    return per_prompt.mean().item(), (1.96 * per_prompt.std().item() / n**0.5 if n > 1 else None)


def evaluate(policy, dataset, cfg, prompts, samples, seed=0, progress="evaluation"):
    """Answer the first `prompts` examples `samples` times each. Returns (scores, records), the same on every rank.

    cfg: a Config or EvalConfig. scores: {"avg", "avg_ci", "pass", "pass_ci"}; records: one dict a prompt, in order. The
    prompts are dealt out over the ranks; sampling is keyed by (seed, rank) and leaves the global generator as it was.
    """
    numbers = range(distributed.rank(), min(prompts or len(dataset), len(dataset)), distributed.world())
    examples = [dataset[i] for i in numbers]
    encoded = [encode_checked(policy, example, cfg) for example in examples]
    records = []
    progress = progress if distributed.rank() == 0 else None
    with torch.random.fork_rng(devices=[policy.device] if policy.device.type == "cuda" else []), distributed.unsharded(policy):
        torch.manual_seed(seed * 1_009 + distributed.rank())
        if examples:
            rollout = generate(
                policy, encoded, samples, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.responses_at_once, progress
            )
            for q, (number, example) in enumerate(zip(numbers, examples)):
                texts = rollout.texts[q * samples : (q + 1) * samples]
                rewards = [reward.grade(text, example.answer, cfg.grader) for text in texts]
                records.append({"number": number, "name": example.name, "problem": example.problem, "answer": example.answer,
                                "kind": example.kind, "rewards": rewards, "responses": texts})  # fmt: skip
    records = sorted(distributed.gather(records), key=lambda record: record["number"])
    rewards = torch.tensor([record["rewards"] for record in records])  # (prompts, samples)
    average, average_ci = interval(rewards.mean(dim=1))
    passed, passed_ci = interval(rewards.amax(dim=1))
    return {"avg": average, "avg_ci": average_ci, "pass": passed, "pass_ci": passed_ci}, records


def describe(scores, samples):
    """The scores as one line of text."""
    width = {key: "?" if scores[key] is None else f"{scores[key]:.3f}" for key in ("avg_ci", "pass_ci")}
    return f"avg@{samples} {scores['avg']:.3f} +- {width['avg_ci']}   pass@{samples} {scores['pass']:.3f} +- {width['pass_ci']}"


def main(argv=None):
    """The command line."""
    cfg = EvalConfig(**vars(command_line(EvalConfig, __doc__).parse_args(argv)))
    reward.check_grader(cfg.grader)
    if cfg.samples < 1 or cfg.prompts < 0 or cfg.max_new_tokens < 1 or cfg.temperature <= 0 or not 0 < cfg.top_p <= 1:
        others = "--prompts not be negative, --temperature be positive and --top_p be in (0, 1]"
        raise ValueError(f"--samples must be at least 1, --max_new_tokens too, {others}")
    dataset = load_data(cfg.data, cfg.split, cfg.instruction)
    if dataset is None and (Path(cfg.data) / "metadata.jsonl").exists():  # a folder without splits is evaluated whole
        dataset = load_data(cfg.data, "train", cfg.instruction)
    if dataset is None:
        raise ValueError(f"--data {cfg.data} has no '{cfg.split}' folder: name another with --split")
    device = distributed.start()
    folder = tiny.ensure(model=cfg.model, data=cfg.data)[0] if cfg.model in tiny.NAMES and distributed.rank() == 0 else cfg.model
    folder = distributed.gather([folder])[0]
    policy = Policy(*load(folder, device), cfg.temperature)
    base = Path(cfg.model) if Path(cfg.model).is_dir() else Path("runs")
    output = Path(cfg.output or base / f"eval-{Path(cfg.data).name}-{cfg.split}")
    output.mkdir(parents=True, exist_ok=True)
    scores, records = evaluate(policy, dataset, cfg, cfg.prompts, cfg.samples, cfg.seed)
    if distributed.rank():
        return
    with open(output / "responses.jsonl", "w") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
    result = {"model": cfg.model, "data": cfg.data, "split": cfg.split, "prompts": len(records), "samples": cfg.samples, **scores}
    (output / "eval.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"{describe(scores, cfg.samples)}   ({len(records)} prompts of {cfg.data}, {cfg.split}; responses in {output})")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError, OSError) as error:
        distributed.leave(f"eval.py: {error}")
    distributed.leave()
