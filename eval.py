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

if __name__ == "__main__":  # Ctrl-C while the libraries below are loaded: one sentence, and no traceback
    import os
    import signal

    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"eval.py: stopped by SIGINT\n"), os._exit(130)))

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import benchmarks
import distributed
import report
from config import check_fields, command_line, option
from data import INSTRUCTION, load_source
from laptop import tiny
from model import Policy, load
from prompts import first_prompt, together, usable
from reward import MAX_LENGTH, check_grader, extract_answer, grade_example, normalise
from rollout import generate


@dataclass
class EvalConfig:
    """Flags of eval.py; the names are those of train.py where they mean the same."""

    model: str = option("tiny", "'tiny' or 'tiny-large' (warmed up, before RL), a checkpoint folder, or a hub id")
    data: str = option("digits", "'digits', 'scenes' or one of its regimes (docs/laptop-tasks.md), a folder with metadata.jsonl or tables, a .jsonl or .parquet file, or a hub id")
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
    attn_implementation: str = option("", "sdpa, eager, flash_attention_2, ...: what transformers computes attention with; default its own choice")
    device: str = option("", "cuda, mps or cpu; default cuda if there is a GPU, else cpu")
    seed: int = option(0, "of sampling")
    output: str = option("", "folder for responses.jsonl and eval.json; default MODEL/eval-DATA-SPLIT or runs/eval-...")
    resume: bool = option(False, "go on with an evaluation that was interrupted, after the last batch that it wrote")
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


def evaluate(policy, dataset, cfg, prompts, samples, seed=0, progress="evaluation", with_ids=0, reward=None, kept=None):
    """Answer the first `prompts` examples `samples` times each. Returns (scores, records), the same on every rank.

    cfg: a Config or EvalConfig. scores: {"avg", "avg_ci", "pass", "pass_ci", "majority", "majority_ci"}, and "left_out" where
    prompts are too long or, with --skip_bad_rows, unusable; records: one dict a prompt, in order, the first `with_ids` with
    "response_ids". kept: where batches are written when they are done (Kept). The prompts are dealt out over the ranks; sampling is keyed by (seed, rank) and leaves the global generator
    as it was.
    """
    count = min(prompts or len(dataset), len(dataset))
    numbers = range(distributed.rank(), count, distributed.world())
    records, left_out, marked, batch = [], {"prompts_too_long": [], "bad_rows": []}, set(), 0
    at_once = max(1, cfg.responses_at_once // samples)  # prompts in a batch
    progress = progress if distributed.rank() == 0 else None
    with torch.random.fork_rng(devices=[policy.device] if policy.device.type == "cuda" else []), distributed.unsharded(policy):
        torch.manual_seed(seed * 1_009 + distributed.rank())
        records += kept.read() if kept else []
        for start in range(0, -(-count // distributed.world()), 512):  # whose images and prompts are in memory together
            rows = numbers[start : start + 512]
            found = together(lambda: usable(policy, dataset, rows, cfg, left_out))
            marked |= {number for number, *_ in found[: with_ids - len(marked)]}  # of this rank: among them the first of all
            found.sort(key=lambda one: one[2]["input_ids"].shape[1])  # prompts of similar length together: less padding
            for first in range(0, len(found), at_once):
                part = found[first : first + at_once]
                batch += 1
                if kept and batch <= kept.batches:
                    continue
                encoded = [prompt for *_, prompt in part]
                rollout = generate(policy, encoded, samples, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.responses_at_once, progress)
                for q, (number, example, _) in enumerate(part):
                    rows_of = range(q * samples, (q + 1) * samples)
                    texts = [rollout.texts[i] for i in rows_of]
                    rewards = [float((reward or grade_example)(text, example, cfg)) for text in texts]
                    records.append({"number": number, "name": example.name, "problem": example.problem, "answer": example.answer,
                                    "kind": example.kind, "rewards": rewards, "responses": texts})  # fmt: skip
                    if number in marked:
                        records[-1]["response_ids"] = [rollout.response_ids[i][rollout.response_mask[i]].tolist() for i in rows_of]
                if kept:
                    kept.write(records[-len(part) :])
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


class Kept:
    """What an evaluation has done so far, on disk: each rank adds its batches to a file as they come, and --resume goes on after the last.

        responses.jsonl          the records of rank 0; of another rank in responses-RANK.jsonl until the end
        unfinished-RANK.pt       how many batches and records are whole, and the state of the random generator after them

    With the same flags and ranks the responses are those of an evaluation that was never interrupted, to the bit.
    """

    def __init__(self, folder, settings, resume):
        rank = distributed.rank()
        self.records = folder / (f"responses-{rank}.jsonl" if rank else "responses.jsonl")
        self.state = folder / f"unfinished-{rank}.pt"
        self.settings, self.batches, self.lines = settings | {"ranks": distributed.world()}, 0, 0
        if not (resume and self.state.exists()):
            self.state.unlink(missing_ok=True)
            self.records.unlink(missing_ok=True)

    def read(self):
        """The records of the batches that are whole; sets the generator to go on after them."""
        if not self.state.exists():
            return []
        state = torch.load(self.state, weights_only=True)
        check_same(state["settings"], self.settings, self.state.parent)
        lines = self.records.read_bytes().split(b"\n")[: state["lines"]]  # what follows is of a batch that was interrupted
        self.records.write_bytes(b"".join(line + b"\n" for line in lines))
        self.batches, self.lines = state["batches"], state["lines"]
        torch.set_rng_state(state["generator"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])
        return [json.loads(line) for line in lines]

    def write(self, records):
        """Add a batch: first its records, then that they are whole."""
        self.batches, self.lines = self.batches + 1, self.lines + len(records)
        state = {"settings": self.settings, "batches": self.batches, "lines": self.lines, "generator": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        try:
            with open(self.records, "a") as file:
                file.write("".join(json.dumps(record) + "\n" for record in records))
            torch.save(state, self.state.with_suffix(".new"))
            os.replace(self.state.with_suffix(".new"), self.state)
        except (OSError, RuntimeError) as error:  # torch.save has its own for a full disk
            reason = str(error).splitlines()[0]
            raise OSError(f"{self.records} cannot be written ({reason}): make room and go on with --resume") from error

    def finish(self, records, result):
        """Write eval.json and, in order, all ranks' records into one file (rank 0). Then nothing is unfinished any more."""
        if distributed.rank() == 0:
            staging = self.records.with_suffix(".new")
            staging.write_text("".join(json.dumps(record) + "\n" for record in records))
            self.records.with_name("eval.json").write_text(json.dumps(result, indent=2) + "\n")
            self.state.unlink(missing_ok=True)
            os.replace(staging, self.records)
        distributed.gather([])  # the other ranks' files go when rank 0 has written theirs
        if distributed.rank():
            self.state.unlink(missing_ok=True)
            self.records.unlink(missing_ok=True)


def check_same(before, now, folder):
    """Raise ValueError if an evaluation that is to go on had other flags."""
    changed = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
    if changed:
        raise ValueError(f"--resume: the evaluation in {folder} had other flags ({', '.join(changed)}): leave --resume out to start again")


def describe(scores, samples):
    """The scores as one line of text."""
    names = ("avg", "pass", "majority")
    width = {name: "?" if scores[f"{name}_ci"] is None else f"{scores[f'{name}_ci']:.3f}" for name in names}
    gone = f"   ({scores['left_out']} prompts left out)" if scores.get("left_out") else ""
    return "   ".join(f"{name}@{samples} {scores[name]:.3f} +- {width[name]}" for name in names) + gone


def main(argv=None):
    """The command line."""
    cfg = EvalConfig(**vars(command_line(EvalConfig, __doc__).parse_args(argv)))
    check_fields(cfg)
    check_grader(cfg.grader)
    copy = "" if cfg.data == EvalConfig.data else cfg.data
    pixels = cfg.min_pixels, cfg.max_pixels
    sets = {name: benchmarks.load(name, copy, cfg.instruction, pixels) for name in benchmarks.named(cfg.benchmark)}
    dataset = next(iter(sets.values())) if sets else load_source((cfg.data, cfg.split, cfg.prompts, True), cfg)
    device = distributed.start(cfg.device)
    folder = tiny.ensure(model=cfg.model, data=cfg.data)[0] if cfg.model in tiny.NAMES and distributed.rank() == 0 else cfg.model
    folder = distributed.gather([folder])[0]
    policy = Policy(*load(folder, device, attention=cfg.attn_implementation, dtype=cfg.dtype), cfg.temperature, dtype=cfg.dtype)
    policy.check_sharing(first_prompt(policy, dataset, range(len(dataset)), cfg))
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
    settings = {name: value for name, value in vars(cfg).items() if name not in ("output", "report", "resume")}
    done = output / "eval.json"
    if cfg.resume and done.exists() and not list(output.glob("unfinished-*.pt")):
        result = json.loads(done.read_text())
        check_same(result.get("settings", {}), settings, output)
        if distributed.rank() == 0:
            print(f"{describe(result, cfg.samples)}   ({cfg.data}, {cfg.split}: was finished before; responses in {output})")
        return result
    Path(cfg.report).parent.mkdir(parents=True, exist_ok=True)
    distributed.gather([])  # no rank begins to write before all have looked
    done.unlink(missing_ok=True)
    with_ids = report.EXAMPLES if cfg.report else 0
    kept = Kept(output, settings, cfg.resume)
    scores, records = evaluate(policy, dataset, cfg, cfg.prompts, cfg.samples, cfg.seed, with_ids=with_ids, kept=kept)
    result = {"model": cfg.model, "data": cfg.data, "split": cfg.split, "prompts": len(records), "samples": cfg.samples}
    result |= {**scores, "settings": settings}
    kept.finish(records, result)
    if distributed.rank():
        return
    print(f"{describe(scores, cfg.samples)}   ({len(records)} prompts of {cfg.data}, {cfg.split}; responses in {output})")
    if cfg.report:
        heading = f"{cfg.model} on {cfg.data}, {cfg.split}: {describe(scores, cfg.samples)} ({len(records)} prompts)"
        page = report.page(policy, dataset, records[: report.EXAMPLES], cfg, heading)
        Path(cfg.report).write_text(page, encoding="utf-8", errors="xmlcharrefreplace")  # a lone surrogate is no UTF-8
        print(f"which tokens looked at the image: {cfg.report}")
    return result


MEMORY = "--responses_at_once, or add --dtype bfloat16"  # what to lower when it is too small


if __name__ == "__main__":
    distributed.run(main, "eval.py", MEMORY)
