"""Everything a run depends on: the settings (Config), the methods, the command line, and the folder that a run writes to.

One field of Config is one flag of train.py. Beside each field stands where its default comes from, or the paper's value where the
laptop's differs. A reader who is after the algorithm needs METHODS, and Config for what a flag means.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from transformers import HfArgumentParser

from data import INSTRUCTION
from dependency import MASKS, METRICS
from reward import GRADERS

# The number of the arithmetic. It is raised when the golden numbers (tests/golden.json) change on purpose. The records of lab/ carry it.
NUMERICS = 1

# What each method switches on: "tgf" filters tokens (Eq. 4), "tas" shapes advantages (Eq. 5), and "dapo" is the recipe of
# Appendix B, which is clip-higher, token-level averaging and dynamic sampling.
METHODS = {
    "vppo": {"tgf", "tas", "dapo"},
    "dapo": {"dapo"},
    "grpo": set(),
    "tgf": {"tgf", "dapo"},  # Table 2
    "tas": {"tas", "dapo"},  # Table 2
    "vppo_grpo": {"tgf", "tas"},  # Table 5: VPPO on a GRPO base
}


# Fields that may differ when a run is resumed. They change speed, memory and files, and whether a bad row ends the run, but no number.
MAY_CHANGE = set(
    """tokens_per_batch share_prompt static_cache shard activation_checkpointing offload_optimizer attn_implementation device
       save_every keep log lora_merge skip_bad_rows""".split()
)


def option(default, help):
    """A Config field with the help text that `--help` shows."""
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """All settings of a run. The defaults are the laptop run's."""

    # What to train
    model: str = option("tiny", "'tiny' or 'tiny-large' (built and warmed up here), a folder in Hugging Face format, or a hub id")
    data: str = option("digits", "'digits', 'scenes' or one of its regimes (docs/laptop-tasks.md), a folder with metadata.jsonl or tables, a .jsonl or .parquet file, or a hub id")
    val_data: str = option("", "data set for validation; default: the split 'val' of --data, if it has one")
    test_data: str = option("", "data set for the final table; default: the split 'test' of --data, if it has one")
    method: str = option("vppo", "vppo, dapo, grpo, tgf (filter only), tas (shaping only) or vppo_grpo")
    steps: int = option(100, "rollout batches to train on")  # ours; the paper: 2 epochs of 38,870 rows
    seed: int = option(0, "prompts, masks and sampling follow from it")
    output: str = option("", "output folder; default runs/METHOD-DATA-SEED")
    lora_rank: int = option(0, "train an adapter of this rank (LoRA, needs peft) instead of the model's own weights; 0 trains the weights")  # ours: 0, as the paper
    lora_merge: bool = option(False, "checkpoints also hold merged/, an ordinary model folder with the adapter added to the weights")
    freeze: str = option("", "leave weights as they are: of vision (tower and projector) or language")  # ours; official: all are trained
    # Rows of a folder, file or hub data set
    problem_column: str = option("problem", "column of the question; <image> in it marks an image's place")  # official data
    answer_column: str = option("answer", "column of the true answer")  # official data
    images_column: str = option("images", "column of one image or a list; metadata.jsonl may also call it file_name(s)")
    instruction: str = option(INSTRUCTION, "appended to every problem")  # Section 4
    min_pixels: int = option(0, "smaller images are enlarged to this area; 0 leaves them")  # Section 4: 200704
    max_pixels: int = option(0, "larger images are shrunk to this area; 0 leaves them")  # Section 4: 1003520
    text_only: str = option("refuse", "a row without image: refuse (an error) or train")
    skip_bad_rows: bool = option(False, "leave out and count rows that cannot be used, instead of an error")
    streaming: bool = option(False, "read tables along instead of downloading them first; shuffled in a buffer")
    # Phase 1: rollout
    prompts_per_step: int = option(16, "Q, prompts per rollout batch over all ranks")  # Table 9: 384
    group_size: int = option(8, "G, responses per prompt")  # Table 9: 8
    temperature: float = option(1.0, "of sampling and of scoring")  # Table 9: 1.0
    top_p: float = option(1.0, "nucleus of the rollout; scoring keeps the full softmax")  # ours 1.0; Table 9: 0.99
    max_new_tokens: int = option(48, "length limit of a response")  # Table 9: 2048 (7B), 4096 (32B)
    max_prompt_tokens: int = option(4096, "longer prompts are left out and counted")  # Section 4
    system_prompt: str = option("You are a helpful assistant.", "system turn, if the chat template has one")
    max_rounds: int = option(3, "rounds of sampling, the first included, before training on the groups there are")  # ours
    grader: str = option("exact", "exact or math-verify; graded is the last \\boxed{} that closes: one cut off at the token limit takes back nothing")
    # Phase 2: dependency
    mask: str = option("blacken", "blacken, noise, blur or grey")  # Appendix F, Table 11
    metric: str = option("kl", "kl, jsd, drop or k3")  # Eq. 3, Table 12; official code: k3
    mask_per: str = option("prompt", "draw a masked image per prompt or per rollout, that is for each response")  # ours: prompt; official: rollout
    # Phase 3: modulation
    k: float = option(0.4, "share of each response's tokens that carry gradient")  # Table 9
    beta_min: float = option(0.9, "smallest shaping factor")  # Table 9
    beta_max: float | None = option(None, "largest shaping factor; default dynamic, mean alpha = 1")  # Table 9
    soft: bool = option(False, "soft token weights instead of a binary mask")  # Appendix I, Table 6
    select: str = option("dependency", "the filter keeps tokens of largest dependency or entropy, or random ones")  # Table 4
    shape: str = option("advantage", "alpha scales the advantage, or the reward it is made from")  # Table 7
    # Phase 4: update
    updates_per_rollout: int = option(2, "optimizer steps per rollout batch")  # Table 9: 3
    lr: float = option(3e-4, "AdamW learning rate")  # ours for 1.6 M weights; Table 9: 1e-6
    lr_schedule: str = option("linear", "linear (to 0) or constant")  # ours; Table 9: constant
    weight_decay: float = option(0.01, "AdamW weight decay")  # Table 9
    max_grad_norm: float = option(1.0, "gradient norm clip")  # Table 9
    clip_low: float = option(0.2, "eps below")  # Appendix B
    clip_high: float | None = option(None, "eps above; default 0.28 with DAPO's recipe, else clip_low")  # Appendix B
    dual_clip: float | None = option(None, "bound on the loss of negative advantages")  # official code: 3.0
    average: str | None = option(None, "token or sequence; default token with DAPO's recipe, else sequence")  # Appendix B
    entropy_penalty: float = option(0.0, "coefficient of the entropy penalty")  # Appendix E: 0.06
    entropy_form: str = option("exact", "exact, or sampled as in the official code")
    # Running it
    tokens_per_batch: int = option(16384, "tokens in one forward pass: memory, and results only by rounding")
    responses_at_once: int = option(1024, "responses in one call of generate: memory (and which samples are drawn)")
    share_prompt: bool = option(True, "run a prompt once for its whole group; --no_share_prompt repeats it")
    static_cache: bool = option(False, "generate with a cache of fixed size, which transformers compiles on a GPU: slow start, fast tokens")
    dtype: str = option("float32", "float32 or bfloat16: of computing; weights, gradients and Adam states stay float32")
    shard: bool = option(False, "FSDP2: weights, gradients and Adam states are split over the ranks")
    activation_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, slower updates")
    offload_optimizer: bool = option(False, "keep Adam's states in CPU memory while they are not used: less GPU memory, equal numbers")
    attn_implementation: str = option("", "sdpa, eager, flash_attention_2, ...: what transformers computes attention with; default its own choice")
    device: str = option("", "cuda, mps or cpu; default cuda if there is a GPU, else cpu")
    eval_every: int = option(20, "validation every so many steps; 0 never")
    eval_prompts: int = option(64, "validation prompts; 0 takes all")
    test_prompts: int = option(512, "held-out prompts of the final table; 0 skips it")
    eval_samples: int = option(8, "responses per evaluated prompt: the 8 of avg@8")
    save_every: int = option(50, "checkpoint every so many steps; the last step always; 0 never")
    keep: int = option(0, "how many of the newest checkpoints to keep; 0 keeps all")
    log: str = option("", "tensorboard: write its files next to metrics.jsonl; wandb: send the metrics there")

    def has(self, part):
        """Whether the method switches on "tgf", "tas" or "dapo"."""
        return part in METHODS[self.method]

    def recipe(self):
        """(average, clip_high): what was asked for, or else what belongs to the method's base, which is DAPO or GRPO."""
        dapo = self.has("dapo")
        average = self.average or ("token" if dapo else "sequence")
        clip_high = self.clip_high if self.clip_high is not None else (0.28 if dapo else self.clip_low)
        return average, clip_high


# The values of fields that are words. Those that train.py and eval.py share have the same name, so both are checked by these tables.
CHOICES = {
    "method": METHODS, "mask": MASKS, "metric": METRICS, "mask_per": ("prompt", "rollout"),
    "select": ("dependency", "entropy", "random"), "shape": ("advantage", "reward"),
    "average": (None, "token", "sequence"), "entropy_form": ("exact", "sampled"), "lr_schedule": ("linear", "constant"),
    "dtype": ("float32", "bfloat16"), "grader": GRADERS, "text_only": ("refuse", "train"),
    "log": ("", "tensorboard", "wandb"), "freeze": ("", "vision", "language"), "device": ("", "cuda", "mps", "cpu"),
}  # fmt: skip

# The values of fields that are numbers: the lowest and the highest that are allowed. These ends are far from any value that makes
# sense. They are there so that a slip (no number, a lost decimal point, a number no computer can count to) is refused at the start.
MANY = 10**9
RANGES = {
    "steps": (0, MANY), "seed": (0, 2**32 - 1), "prompts_per_step": (1, 10**6), "group_size": (2, 10**5), "max_rounds": (1, 1000),
    "updates_per_rollout": (1, 10**6), "max_new_tokens": (1, 10**6), "max_prompt_tokens": (1, 10**7),
    "tokens_per_batch": (1, MANY), "responses_at_once": (1, MANY), "min_pixels": (0, MANY), "max_pixels": (0, MANY),
    "eval_every": (0, MANY), "eval_prompts": (0, MANY), "test_prompts": (0, MANY), "eval_samples": (1, 10**5),
    "save_every": (0, MANY), "keep": (0, MANY), "samples": (1, 10**5), "prompts": (0, MANY),
    "temperature": (0.01, 100), "top_p": (0.001, 1), "k": (0.0001, 1), "beta_min": (0, 10), "beta_max": (0, 10),
    "lr": (1e-12, 1), "weight_decay": (0, 1), "max_grad_norm": (1e-6, 1e9), "clip_low": (0, 0.999), "clip_high": (0, 100),
    "dual_clip": (1.001, 1000), "entropy_penalty": (0, 10), "lora_rank": (0, 10**4),
}  # fmt: skip


def check_fields(cfg):
    """Raise ValueError with one sentence if a field of a Config or EvalConfig, taken alone, makes no sense."""
    values = vars(cfg)
    for name, allowed in CHOICES.items():
        if name in values and values[name] not in allowed:
            known = ", ".join(str(choice) for choice in allowed if choice)
            raise ValueError(f"--{name} '{values[name]}' is unknown: choose one of {known}")
    for name, (low, high) in RANGES.items():
        value = values.get(name)
        if value is not None and not low <= value <= high:  # nan fails every comparison
            note = " (0, the default, trains the model's own weights)" if name == "lora_rank" else ""
            raise ValueError(f"--{name} must be from {low:,} to {high:,}, got {value}{note}")
    for name, value in values.items():
        if isinstance(value, str) and any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"--{name} {value!r} is no text in UTF-8")
        if name in ("model", "data") and not value.strip():
            raise ValueError(f"--{name} '' is unknown: leave it out for its default")
    if 0 < cfg.max_pixels < cfg.min_pixels:
        raise ValueError(f"--min_pixels {cfg.min_pixels} and --max_pixels {cfg.max_pixels} are no range: 0 is no limit")


def check(cfg):
    """Raise ValueError with one sentence if a field of the config, or two of them together, make no sense."""
    check_fields(cfg)
    rules = [
        (not (cfg.shard and cfg.text_only == "train"), "--text_only train cannot go with --shard: ranks without images would wait"),
        (cfg.beta_max is None or cfg.beta_min <= cfg.beta_max, f"--beta_min {cfg.beta_min} exceeds --beta_max {cfg.beta_max}"),
        (0 < cfg.beta_min <= 1 or cfg.beta_max is not None, f"--beta_min must be in (0, 1] when beta_max is dynamic, got {cfg.beta_min}"),
        (cfg.updates_per_rollout <= cfg.prompts_per_step,
         f"--updates_per_rollout {cfg.updates_per_rollout} exceeds --prompts_per_step {cfg.prompts_per_step}"),
        (cfg.lora_rank or not cfg.lora_merge, "--lora_merge needs --lora_rank: without an adapter every checkpoint is an ordinary model folder"),
        (not (cfg.lora_rank and cfg.freeze), f"--freeze {cfg.freeze} cannot go with --lora_rank, which freezes all weights of the model"),
    ]  # fmt: skip
    for good, sentence in rules:
        if not good:
            raise ValueError(sentence)


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------
def command_line(config, description):
    """An argument parser with a flag per field of a config dataclass; a bad flag is a ValueError of one sentence.

    A flag must be written out: an abbreviation may mean another one than it seems to (--step is not --steps).
    """
    words = dict(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser = HfArgumentParser(config, **words)

    def fail(message):
        raise ValueError(f"{message} (--help lists all flags)")

    parser.error = fail
    return parser


def parse(argv=None, description=None):
    """The command line of train.py -> (Config, what to resume, whether it is a dry run). Raises ValueError with one sentence.

    `--config FILE.json` gives values that other flags override. `--resume [PATH]` does the same with the config.json of the run
    that goes on. What to resume: None, a run's folder (its newest whole checkpoint) or a checkpoint's. Under `torchrun
    --max-restarts` a run whose --output exists goes on by itself: whichever process starts again, and however often.
    """
    parser = command_line(Config, description)
    parser.add_argument("--config", help="JSON file with any of these fields; flags override it")
    parser.add_argument("--dry_run", action="store_true", help="check and describe the run, and end: no weights, no network")
    text = "go on from the last whole checkpoint, or from the one at this path (newer ones of its run are removed)"
    parser.add_argument("--resume", nargs="?", const="", help=text)
    argv = sys.argv[1:] if argv is None else list(argv)
    flags = parser.parse_args(argv)
    if flags.config is not None:
        argv = as_words(read_fields(flags.config, "--config")) + argv
        flags = parser.parse_args(argv)
    resume = flags.resume
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        if not flags.output:
            raise ValueError("torchrun --max-restarts needs --output FOLDER, so that a restart finds its run")
        resume = existing_run(flags) or resume
    if resume == "":
        resume = existing_run(flags)
        if resume is None:
            raise ValueError(f"--resume finds no run in {flags.output or default_folder(flags)}: give its folder with --output")
    saved = {}
    if resume:
        resume = Path(resume)
        run = run_of(resume)
        saved = read_fields(run / "config.json", "--resume")
        if flags.output and os.path.realpath(flags.output) != os.path.realpath(run):
            raise ValueError(f"--output {flags.output} is not the folder of --resume {resume}: leave one of them out")
        argv = [*argv, f"--output={run}"]
    namespace = vars(parser.parse_args(as_words(saved) + argv))
    cfg = Config(**{field.name: namespace[field.name] for field in fields(Config)})
    check(cfg)
    changed = {name for name, value in saved.items() if getattr(cfg, name) != value} - {"output"}
    if changed:
        differences = ", ".join(f"{name} {saved[name]} -> {getattr(cfg, name)}" for name in sorted(changed))
        if changed - MAY_CHANGE:
            raise ValueError(f"--resume {resume}: the run would not be the same one ({differences}): leave these flags out")
        if os.environ.get("RANK", "0") == "0":
            print(f"resuming with {differences}")
    return cfg, resume, flags.dry_run


def read_fields(file, flag):
    """A JSON file of Config fields as a dict. Null is a value only where it is the default."""

    def once(pairs):
        twice = [name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i])]
        if twice:
            raise ValueError(f"{twice[0]!r} stands in it twice")
        return dict(pairs)

    try:
        if not file or Path(file).exists() and not Path(file).is_file():  # reading a pipe could wait for ever
            raise ValueError("it is no file")
        values = json.loads(Path(file).read_text(encoding="utf-8"), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{flag} {file or repr(file)} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{flag} {file} must hold one JSON object of fields")
    defaults = {field.name: field.default for field in fields(Config)}
    unknown = set(values) - set(defaults)
    if unknown:
        raise ValueError(f"{flag} {file} has unknown fields: {', '.join(sorted(unknown))}")
    for name, value in values.items():
        if isinstance(value, (dict, list)) or (value is None and defaults[name] is not None):
            raise ValueError(f"{flag} {file}: {name} cannot be {json.dumps(value)[:80]}: leave it out for its default")
    return values


def as_words(values):
    """Fields as words of a command line: put before the real ones, they are checked like flags and overridden by them."""
    words = []
    for name, value in values.items():
        words += [] if value is None else [f"--{name}={value if isinstance(value, str) else json.dumps(value)}"]
    return words


# ---------------------------------------------------------------------------------------------------------------------
# The folder of a run
# ---------------------------------------------------------------------------------------------------------------------
def default_folder(cfg):
    """Where a run goes that was not told where."""
    return f"runs/{cfg.method}-{Path(cfg.data).name}-{cfg.seed}"


def numbered(base):
    """base, base-2, base-3, ..."""
    return (Path(base + end) for end in ["", *(f"-{n}" for n in range(2, 10_000))])


def existing_run(cfg):
    """The folder of the run these flags started last, or None."""
    candidates = [Path(cfg.output)] if cfg.output else numbered(default_folder(cfg))
    last = None
    for folder in candidates:
        if not folder.exists():
            break
        last = folder if (folder / "config.json").exists() else last
    return last


def run_of(path):
    """The run's folder for a run's folder or one of its checkpoints."""
    return path.parent.parent if path.parent.name == "checkpoints" else path


def output_folder(cfg):
    """Where a new run goes: --output, which must not hold another run, or the default with the next free number."""
    for name in ("config.json", "metrics.jsonl", "checkpoints") if cfg.output else ():
        if os.path.lexists(Path(cfg.output, name)):
            advice = "choose another folder, or --resume it" if name == "config.json" else "choose another folder"
            raise ValueError(f"--output {cfg.output} already holds a run's {name}: {advice}")
    return Path(cfg.output) if cfg.output else next(folder for folder in numbered(default_folder(cfg)) if not folder.exists())
