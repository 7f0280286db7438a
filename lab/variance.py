"""How far does Theorem 3.1 hold? Var(g_VPPO) ~ k E[alpha^2] Var(g_GRPO), on the gradients of a real policy's responses.

    python -m lab.variance                       a VPPO run of 100 steps: its start, middle and end; results/variance.*
    python -m lab.variance --checkpoints A B     models that are there already (folders in Hugging Face format)
    python -m lab.variance --quick               about a minute, to see it work; runs/variance-quick/

A response's gradient over all weights is g = alpha A sum_{t in K} v_t, with scores v_t = grad log pi(o_t | s_t, I). METHODS
differ in K and alpha; they share one policy and one set of rollouts: groups with signal, as dynamic sampling keeps them.
Two variances, both the trace of a covariance. Of a *response's* gradient: what the theorem speaks of. Of a *prompt's*, the
mean of its G responses: these share a baseline, so prompts are the independent units of a batch. With mu the mean gradient,
    signal / noise = |mu|^2 / Var(prompt's gradient); a batch of Q prompts has Q times that, whatever the gradient's scale.
|mu|^2 is the mean inner product of *different* prompts' gradients: no bias, so it may come out negative. The Gram matrix
over prompts and each response's |g|^2 hold all that is asked for; the bootstrap over prompts only weighs them anew.
"""

import functools
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import loss
import train
import vppo
from config import Config, command_line, option
from data import load_data
from lab import runs
from laptop import tiny
from model import Policy, load

CHOICES = ("all", "dependency", "random", "entropy")  # K: all tokens, or k |o| of them: by S, at random, by entropy
METHODS = {"GRPO": ("all", False), "TAS": ("all", True), "TGF": ("dependency", False), "VPPO": ("dependency", True),
           "random-k": ("random", False), "entropy-k": ("entropy", False)}  # name: (K, whether alpha scales)  # fmt: skip
MAIN = ("tokens kept", "k E[alpha^2]", "variance / GRPO's", "signal / noise", "minus GRPO's", "cosine")
FACTORS = ("norms", "cross terms", "advantages", "alpha", "mean")  # from the theorem to the measured ratio
RAW = ("norm kept / dropped", "cross terms / squares", "corr(alpha^2, A^2)", "squared mean / second moment")


@dataclass
class VarianceConfig:
    """Flags of lab/variance.py."""

    checkpoints: list[str] = field(default_factory=list, metadata={"help": "model folders; default: of a run made here"})
    data: str = option("digits", "as in train.py")
    steps: int = option(100, "steps of that VPPO run")
    prompts: int = option(32, "Q, prompts with signal per checkpoint; memory is that of 6 Q gradients")
    output: str = option("", "folder for variance.md, .json and .png; default results")
    quick: bool = option(False, "4 prompts, a run of 4 steps")


def token_scores(policy, rollout, i):
    """(|o_i|, P): the score v_t of each token of response i, over the P weights that responses use."""
    n = int(rollout.response_mask[i].sum())
    ids = rollout.response_ids[i : i + 1, :n]
    states = policy.token_states([rollout.prompts[i // rollout.group_size]], ids, ids >= 0)
    logprobs = policy.scores(states, ids[0], with_entropy=False)[:, 0]  # (n,)
    one_each = torch.eye(n, device=ids.device)  # (n, n): a backward pass per token, all at once
    grads = torch.autograd.grad(logprobs, list(policy.parameters()), one_each, is_grads_batched=True, allow_unused=True)
    return torch.cat([grad.flatten(1) for grad in grads if grad is not None], dim=1)


def tally(scores, masks, advantages, alpha, group_size):
    """What `estimates` needs, in one sweep over B responses.

    scores: a function i -> (|o_i|, P); masks: {choice: (B, T) bool}; advantages (B,): A, without alpha; alpha (B,).
    Returns float64 tensors: squared (B, 4) = |sum_{t in K} v_t|^2, squares (B, 4) = sum_{t in K} |v_t|^2, kept (B, 4) = |K|,
    with columns as CHOICES; gram (6, Q, Q) of the prompts' gradients, by method; advantages and alpha (B,).
    """
    rows, sums = [], None
    for i in tqdm(range(len(advantages)), "gradients", leave=False, disable=None):
        v = scores(i)  # (n, P)
        chosen = torch.stack([masks[choice][i, masks["all"][i]] for choice in CHOICES]).to(v.dtype)  # (4, n)
        total = chosen @ v  # (4, P)
        rows.append(torch.stack([total.square().sum(1), chosen @ v.square().sum(1), chosen.sum(1)]))  # (3, 4)
        sums = v.new_zeros(len(METHODS), len(advantages) // group_size, v.shape[1]) if sums is None else sums
        for mean, (choice, shaped) in zip(sums[:, i // group_size], METHODS.values()):
            mean += float(advantages[i] * (alpha[i] if shaped else 1)) / group_size * total[CHOICES.index(choice)]
    # In float64, some weights at a time: |mu|^2 is small beside what it is told from.
    gram = torch.stack([sum(x.double() @ x.double().T for x in mean.split(2**16, dim=1)) for mean in sums])
    names = ("squared", "squares", "kept", "gram", "advantages", "alpha")
    return {name: x.double().cpu() for name, x in zip(names, [*torch.stack(rows).unbind(1), gram, advantages, alpha])}


def measure(policy, cfg):
    """(tally, mean reward) of Q prompts with signal: phases 1 to 3 of training, on data that no run reaches."""
    settings = Config(data=cfg.data, prompts_per_step=cfg.prompts, max_rounds=50)
    torch.manual_seed(settings.seed)
    batch, _, metrics = vppo.collect(policy, load_data(cfg.data, "train", settings), settings, 2**19)
    if batch is None or len(batch.examples) < 2:
        raise ValueError(f"--data {cfg.data}: fewer than 2 prompts have both right and wrong responses")
    vppo.measure(policy, batch, settings)
    vppo.modulate(batch, settings)
    mask = batch.rollout.response_mask
    masks = {"all": mask, "dependency": batch.token_mask, "entropy": loss.token_filter(batch.entropy, mask, settings.k)}
    masks["random"] = loss.token_filter(torch.rand(mask.shape).to(mask.device), mask, settings.k)
    advantages = loss.group_advantages(batch.rewards, settings.group_size)
    policy.share_prompt = False  # a response at a time has nothing to share, and one pass is faster than two
    scores = functools.partial(token_scores, policy, batch.rollout)
    return tally(scores, masks, advantages, batch.alpha, settings.group_size), metrics["reward"]


def estimates(t, counts):
    """{method: {quantity: (R,)}} from a tally, for R ways to count its prompts: counts (R, Q), rows summing to Q.

    The ratio of variances is exactly k E[alpha^2], k the share of tokens kept, times FACTORS, each 1 if an assumption holds:
        norms        mean |v_t|^2 of kept tokens / of all tokens                            equal score norms
        cross terms  E|sum_{t in K} v_t|^2 / E sum_{t in K} |v_t|^2, over that of GRPO      uncorrelated scores
        advantages   E[A^2 x] / (E[A^2] E[x]), x = |sum_{t in K} v_t|^2, over that of GRPO  A independent of scores
        alpha        E[alpha^2 A^2 x] / (E[alpha^2] E[A^2 x])                               alpha independent of A and scores
        mean         1 - |mu|^2 / E|g|^2, over that of GRPO                                 second moment dominates
    cosine: of a prompt's gradient with the mean of all the others', which the bootstrap leaves as it is.
    """
    Q, result, A2 = counts.shape[1], {}, t["advantages"] ** 2

    def mean(x):
        """Mean over prompts and their responses: (B,) -> (R,)."""
        return counts @ x.reshape(Q, -1).mean(1) / Q

    x_all, n_all, s_all = (t[key][:, 0] for key in ("squared", "kept", "squares"))
    for gram, (name, (choice, shaped)) in zip(t["gram"], METHODS.items()):
        x, n, s = (t[key][:, CHOICES.index(choice)] for key in ("squared", "kept", "squares"))
        alpha2 = t["alpha"] ** 2 if shaped else torch.ones_like(A2)
        own, second = gram.diagonal(), mean(alpha2 * A2 * x)
        # A prompt drawn twice is no pair of different prompts: the products of its copies are left out.
        signal = (((counts @ gram) * counts).sum(1) - counts**2 @ own) / (Q**2 - (counts**2).sum(1))
        others = gram.sum(1) - own  # (Q,): <g_q, sum of the others>
        cosine = others / (own * (gram.sum() - 2 * others - own)).clamp(min=1e-30).sqrt()
        q = result[name] = {"variance": second - signal, "signal / noise": signal / (counts @ own / Q - signal)}
        grpo = result["GRPO"]
        q["tokens kept"], q["k E[alpha^2]"] = mean(n) / mean(n_all), mean(n) / mean(n_all) * mean(alpha2)
        q["variance / GRPO's"], q["cosine"] = q["variance"] / grpo["variance"], counts @ cosine / Q
        q["minus GRPO's"] = q["signal / noise"] - grpo["signal / noise"]
        q["cross terms / squares"], q["squared mean / second moment"] = mean(x) / mean(s) - 1, signal / second
        q["norms"] = mean(s) / mean(s_all) * mean(n_all) / mean(n)
        q["cross terms"] = mean(x) / mean(s) * mean(s_all) / mean(x_all)
        q["advantages"] = mean(A2 * x) / mean(x) * mean(x_all) / mean(A2 * x_all)
        q["alpha"] = second / (mean(alpha2) * mean(A2 * x))
        q["mean"] = (1 - signal / second) / (1 - grpo["squared mean / second moment"])
        if choice != "all":
            q["norm kept / dropped"] = mean(s) / mean(n) * mean(n_all - n) / mean(s_all - s)
        if shaped:
            spread = (mean(alpha2**2) - mean(alpha2) ** 2) * (mean(A2**2) - mean(A2) ** 2)
            q["corr(alpha^2, A^2)"] = (mean(alpha2 * A2) - mean(alpha2) * mean(A2)) / spread.clamp(min=1e-30).sqrt()
    return result


def bootstrap(function, units, replicates=2000):
    """{method: {quantity: [estimate, low, high]}}: 95 % percentiles over resampled units, the same for all methods.

    function: counts (R, units) -> {method: {quantity: (R,)}}, for R ways to count the units; the first counts each once.
    """
    draws = torch.randint(units, (replicates, units), generator=torch.Generator().manual_seed(0))
    counts = torch.cat([torch.ones(1, units), torch.nn.functional.one_hot(draws, units).sum(1)]).double()
    ends, result = torch.tensor([0.025, 0.975]).double(), function(counts).items()
    return {m: {key: [x[0].item(), *x[1:].nanquantile(ends).tolist()] for key, x in q.items()} for m, q in result}


def intervals(t, replicates=2000):
    """The estimates of a tally with 95 % intervals, by `bootstrap` over its prompts."""
    return bootstrap(functools.partial(estimates, t), t["gram"].shape[1], replicates)


def sentences(e):
    """What the numbers of one checkpoint say, a sentence a finding."""

    def against(triple, null, below, between, above):
        """One of three words: the interval lies below `null`, holds it, lies above it."""
        return below if triple[2] < null else above if triple[1] > null else between

    for m in ("TGF", "random-k", "entropy-k"):
        kept, theorem, ratio, norms, pairs, advantages = (e[m][key] for key in (*MAIN[:3], *FACTORS[:3]))
        word = against(ratio, theorem[0], "less than", "no contradiction to", "more than")
        yield (f"{m} keeps {kept[0]:.0%} of the tokens and {ratio[0]:.0%} of the variance, {word} "
               f"the theorem's {theorem[0]:.0%}: kept tokens have {norms[0]:.2f} times the average squared norm, pairs of "
               f"tokens give a factor of {pairs[0]:.2f}, advantages that go with scores {advantages[0]:.2f}.")  # fmt: skip
    ratio, theorem, alpha = (e["TAS"][key] for key in (MAIN[2], MAIN[1], "alpha"))
    word = against(ratio, 1, "lowers", "does not measurably change", "raises")
    yield (f"TAS alone {word} the variance: {ratio[0]:.3f} times GRPO's. E[alpha^2] is {theorem[0]:.3f}; that alpha goes "
           f"with the size of the gradients it scales makes a factor of {alpha[0]:.2f}.")  # fmt: skip
    for m in list(METHODS)[1:]:
        word = against(e[m]["minus GRPO's"], 0, "worse than", "not to be told from", "better than")
        yield f"Signal to noise of {m} is {word} GRPO's: {e[m][MAIN[3]][0]:.3f} against {e['GRPO'][MAIN[3]][0]:.3f}."


def table(e, keys):
    """A markdown table of estimates with their intervals, a row per method; what makes no sense for a method is a dash."""
    rows = [["method", *keys], ["---"] * (len(keys) + 1)]
    rows += [[m, *("{:.3f} [{:.3f}, {:.3f}]".format(*q[key]) if key in q else "-" for key in keys)] for m, q in e.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def report(name, e, reward, t):
    """One checkpoint's section of variance.md."""
    size = f"{len(t['gram'][0])} prompts with signal, {len(t['alpha'])} responses, {t['kept'][:, 0].sum():.0f} tokens"
    parts = [f"## {name}", f"Mean reward {reward:.2f}; {size}; in brackets 95 % intervals.", table(e, MAIN)]
    parts += ["From the theorem to the measured ratio, which is the product; a factor is 1 where an assumption holds:"]
    parts += [table(e, (MAIN[1], *FACTORS)), table(e, RAW), "\n".join(f"* {sentence}" for sentence in sentences(e))]
    return "\n\n".join(parts)


def picture(results, file):
    """Ratios of variances beside the theorem's, and signal to noise; a bar per method and checkpoint."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no picture: it needs pip install matplotlib")
    figure, width = Figure(figsize=(12, 3.6), layout="constrained"), 0.8 / len(results)
    for axes, key in zip(figure.subplots(1, 2), MAIN[2:4]):
        for i, (name, e) in enumerate(results.items()):
            at = [m + (i + 0.5) * width - 0.4 for m in range(len(e))]
            middle, low, high = torch.tensor([e[m][key] for m in e]).T
            error = torch.stack([middle - low, high - middle]).clamp(min=0)
            axes.bar(at, middle, 0.9 * width, yerr=error, capsize=2, label=name)
            if key == MAIN[2]:
                axes.plot(at, [e[m][MAIN[1]][0] for m in e], "kD", markersize=4, label=None if i else MAIN[1])
        axes.set(xticks=range(len(METHODS)), xticklabels=METHODS, ylabel=key)
    figure.axes[0].legend()
    figure.savefig(file, dpi=110)


def trained(cfg, folder):
    """{name: model folder} at the start, the middle and the end of a VPPO run made in `folder`."""
    half, end = cfg.steps // 2, cfg.steps
    flags = f"--steps={end} --save_every={half} --eval_every=0 --test_prompts=0".split()
    if train.main([*flags, "--data", cfg.data, "--output", folder]) is None:
        raise ValueError("the run was stopped before its end")
    return {"step 0": tiny.ensure(data=cfg.data)[0]} | {f"step {n}": f"{folder}/checkpoints/step-{n:06d}" for n in (half, end)}


def main(argv=None):
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    cfg = VarianceConfig(**vars(command_line(VarianceConfig, __doc__).parse_args(argv)))
    cfg.prompts, cfg.steps = (4, 4) if cfg.quick else (cfg.prompts, cfg.steps)
    if min(cfg.prompts, cfg.steps) < 2:
        raise ValueError(f"--prompts and --steps must be at least 2, got {cfg.prompts} and {cfg.steps}")
    output, results = Path(cfg.output or runs.ROOT / ("runs/variance-quick" if cfg.quick else "results")), {}
    output.mkdir(parents=True, exist_ok=True)
    commit = runs.commit()
    parts = ["# Theorem 3.1 against measured gradients", f"    {' '.join(['python -m lab.variance', *argv])}"]
    parts.append(f"At commit {commit}, torch {torch.__version__}.")
    with tempfile.TemporaryDirectory() as folder:
        for name, path in ({path: path for path in cfg.checkpoints} or trained(cfg, f"{folder}/run")).items():
            t, reward = measure(Policy(*load(path, "cuda" if torch.cuda.is_available() else "cpu")).eval(), cfg)
            results[name] = intervals(t)
            parts.append(report(name, results[name], reward, t))
            print(f"\n{parts[-1]}", flush=True)
    (output / "variance.md").write_text("\n\n".join(parts) + "\n")
    (output / "variance.json").write_text(json.dumps({"commit": commit, "settings": vars(cfg), "checkpoints": results}, indent=1) + "\n")
    picture(results, output / "variance.png")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"lab.variance: {error}")
