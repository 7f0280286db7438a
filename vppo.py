"""VPPO on one page: Config, and `train_step`, which is Algorithm 1 of arXiv 2510.09285 in its four phases.

    1. Rollout      G responses to each prompt, graded; groups without signal replaced (DAPO's dynamic sampling)
    2. Dependency   one scoring pass with the true image and one with a masked image: old log-probs and S(s_t, I), Eq. 3
    3. Modulation   alpha per response (TAS, Eq. 5), mask per token (TGF, Eq. 4)
    4. Update       the clipped objective (Eq. 6), AdamW

The other methods are this one with parts switched off (METHODS). Read dependency.py and loss.py next.
"""

import time
from dataclasses import dataclass, field

import torch

import dependency
import distributed
import loss
import reward
from data import example_at
from model import encode
from rollout import concatenate, generate, micro_batches

# What each method switches on. "dapo" = clip-higher, token-level averaging and dynamic sampling (paper, Appendix B).
METHODS = {
    "vppo": {"tgf", "tas", "dapo"},
    "dapo": {"dapo"},
    "grpo": set(),
    "tgf": {"tgf", "dapo"},  # Table 2
    "tas": {"tas", "dapo"},  # Table 2
    "vppo_grpo": {"tgf", "tas"},  # Table 5: VPPO on a GRPO base
}


def option(default, help):
    """A Config field with the help text that `--help` shows."""
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Everything a run depends on. Defaults are the laptop run; configs/ holds the paper's. One field, one flag."""

    # What to train
    model: str = option("tiny", "'tiny' (built and warmed up here), a folder in Hugging Face format, or a hub id")
    data: str = option("digits", "'digits', a folder with metadata.jsonl and images, or a hub id")
    method: str = option("vppo", "vppo, dapo, grpo, tgf (filter only), tas (shaping only) or vppo_grpo")
    steps: int = option(60, "rollout batches to train on")  # ours; the paper: 2 epochs of 38,870 rows
    seed: int = option(0, "prompts, masks and sampling follow from it")
    output: str = option("", "output folder; default runs/METHOD-DATA-SEED")
    # Phase 1: rollout
    prompts_per_step: int = option(16, "Q, prompts per rollout batch over all ranks")  # Table 9: 384
    group_size: int = option(8, "G, responses per prompt")  # Table 9: 8
    temperature: float = option(1.0, "of sampling and of scoring")  # Table 9: 1.0
    top_p: float = option(1.0, "nucleus of the rollout; scoring keeps the full softmax")  # ours 1.0; Table 9: 0.99
    max_new_tokens: int = option(48, "length limit of a response")  # Table 9: 2048 (7B), 4096 (32B)
    max_prompt_tokens: int = option(4096, "a longer prompt is an error")  # Section 4
    system_prompt: str = option("You are a helpful assistant.", "system turn, if the chat template has one")
    max_rounds: int = option(3, "rounds of dynamic sampling before training on the groups there are")  # ours
    grader: str = option("exact", "exact or math-verify")
    # Phase 2: dependency
    mask: str = option("blacken", "blacken, noise, blur or grey")  # Appendix F, Table 11
    metric: str = option("kl", "kl, jsd, drop or k3")  # Eq. 3, Table 12; official code: k3
    mask_per: str = option("prompt", "draw a masked image per prompt or per rollout")  # ours: prompt; official: rollout
    # Phase 3: modulation
    k: float = option(0.4, "share of each response's tokens that carry gradient")  # Table 9
    beta_min: float = option(0.9, "smallest shaping factor")  # Table 9
    beta_max: float | None = option(None, "largest shaping factor; default dynamic, mean alpha = 1")  # Table 9
    soft: bool = option(False, "soft token weights instead of a binary mask")  # Appendix I, Table 6
    # Phase 4: update
    updates_per_rollout: int = option(1, "optimizer steps per rollout batch")  # Table 9: 3
    lr: float = option(1e-4, "AdamW learning rate")  # ours for 1.6 M weights; Table 9: 1e-6
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
    tokens_per_batch: int = option(16384, "tokens in one forward pass: memory, not results")
    share_prompt: bool = option(True, "run a prompt once for its whole group; --no_share_prompt repeats it")
    dtype: str = option("float32", "weights: float32 or bfloat16")
    eval_every: int = option(10, "validation every so many steps; 0 never")
    eval_prompts: int = option(64, "validation prompts")
    test_prompts: int = option(512, "held-out prompts of the final table; 0 skips it")
    eval_samples: int = option(8, "responses per evaluated prompt: the 8 of avg@8")
    save_every: int = option(20, "checkpoint every so many steps; the last step always; 0 never")

    def has(self, part):
        """Whether the method switches on "tgf", "tas" or "dapo"."""
        return part in METHODS[self.method]


def check(cfg):
    """Raise ValueError with one sentence if a field of the config makes no sense."""
    choices = {
        "method": METHODS, "mask": dependency.MASKS, "metric": dependency.METRICS, "mask_per": ("prompt", "rollout"),
        "average": (None, "token", "sequence"), "entropy_form": ("exact", "sampled"), "lr_schedule": ("linear", "constant"),
        "dtype": ("float32", "bfloat16"), "grader": reward.GRADERS,
    }  # fmt: skip
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            known = ", ".join(str(choice) for choice in allowed if choice)
            raise ValueError(f"--{name} '{getattr(cfg, name)}' is unknown: choose one of {known}")
    rules = [
        (0 < cfg.k <= 1, f"--k must be in (0, 1], got {cfg.k}"),
        (cfg.group_size >= 2, f"--group_size must be at least 2 to compare responses, got {cfg.group_size}"),
        (cfg.beta_max is None or cfg.beta_min <= cfg.beta_max, f"--beta_min {cfg.beta_min} exceeds --beta_max {cfg.beta_max}"),
        (0 < cfg.beta_min <= 1 or cfg.beta_max is not None, f"--beta_min must be in (0, 1] when beta_max is dynamic, got {cfg.beta_min}"),
        (cfg.temperature > 0, f"--temperature must be positive, got {cfg.temperature}"),
        (0 < cfg.top_p <= 1, f"--top_p must be in (0, 1], got {cfg.top_p}"),
        (cfg.eval_samples >= 1, f"--eval_samples must be at least 1, got {cfg.eval_samples}"),
    ]
    for name in ("prompts_per_step", "max_new_tokens", "max_prompt_tokens", "max_rounds", "updates_per_rollout", "tokens_per_batch"):
        rules.append((getattr(cfg, name) >= 1, f"--{name} must be at least 1, got {getattr(cfg, name)}"))
    for name in ("steps", "eval_every", "eval_prompts", "test_prompts", "save_every"):
        rules.append((getattr(cfg, name) >= 0, f"--{name} must not be negative, got {getattr(cfg, name)}"))
    if cfg.updates_per_rollout > cfg.prompts_per_step:
        rules.append((False, f"--updates_per_rollout {cfg.updates_per_rollout} exceeds --prompts_per_step {cfg.prompts_per_step}"))
    for good, sentence in rules:
        if not good:
            raise ValueError(sentence)
    reward.check_grader(cfg.grader)


@dataclass
class Batch:
    """A rollout batch on its way through the four phases. B = Q * G rows, group after group; this rank's share."""

    rollout: object
    examples: list  # Q
    positions: list  # Q, each example's place in the run's data: the key of its masked image
    rewards: torch.Tensor  # (B,)
    old_logprobs: torch.Tensor = None  # (B, T)
    entropy: torch.Tensor = None  # (B, T)
    dependency: torch.Tensor = None  # (B, T) S of Eq. 3
    alpha: torch.Tensor = None  # (B,) Eq. 5
    token_mask: torch.Tensor = None  # (B, T) bool, or float weights
    advantages: torch.Tensor = None  # (B,) A' = alpha * A
