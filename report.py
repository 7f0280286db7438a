"""What a person looks at: a page on which tokens looked at the image (eval.py --report), and the curves of a run (train.py).

    page      one HTML file that needs nothing else: images, true and masked, and every response with its tokens shaded by S
              (Eq. 3), those that TGF keeps boxed (Eq. 4), with reward, advantage (Eq. 1) and alpha (Eq. 5)
    curves    metrics.jsonl -> curves.png, where matplotlib is installed

Responses are text nobody vouches for: all of it is escaped, and the page forbids itself scripts and the network.
"""

import base64
import io
import json
import math
from html import escape

import numpy as np
import torch

import dependency
import loss
from prompts import encode, with_images
from rollout import Rollout

EXAMPLES = 8  # on a page; a person reads no more
LEVELS = (0.01, 0.1, 1.0)  # S in nats where the next darker shade begins: it spans orders of magnitude (paper, Figure 3)
SIDE = 400  # pixels of the longer side of an image on the page


# ---------------------------------------------------------------------------------------------------------------------
# The numbers
# ---------------------------------------------------------------------------------------------------------------------
def measure(policy, dataset, records, seed=0, system_prompt=""):
    """S and what follows from it for some evaluated prompts, with the paper's settings: blackened patches, KL, k = 0.4.

    records: of eval.evaluate, with "response_ids", all with equally many. Returns a dict: examples (Q), masked (Q lists of
    images), rollout, and by response, group after group: dependency, token_mask (B, T); mean, alpha, advantages (B,).
    alpha ranks all responses given here; advantages are 0 where there is one response a prompt.
    """
    examples = [dataset[record["number"]] for record in records]
    masked = [dependency.mask_images(e.images, "blacken", [seed, r["number"], 0]) for e, r in zip(examples, records)]
    prompts = [encode(policy.processor, example, system_prompt) for example in examples]
    rows = [torch.tensor(ids, device=policy.device) for record in records for ids in record["response_ids"]]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=policy.pad_id)  # (B, T)
    lengths = torch.tensor([len(row) for row in rows], device=policy.device)
    mask = torch.arange(ids.shape[1], device=policy.device) < lengths[:, None]
    texts = [text for record in records for text in record["responses"]]
    truncated = torch.tensor([row[-1].item() not in policy.eos_ids for row in rows])
    rollout = Rollout(prompts, ids, mask, texts, truncated, policy.pad_id)
    masked_prompts = [with_images(policy.processor, prompt, images) for prompt, images in zip(prompts, masked)]
    S = dependency.score(policy, rollout, masked_prompts)["dependency"]
    mean = loss.masked_mean(S, mask)
    rewards = torch.tensor([value for record in records for value in record["rewards"]])
    G = rollout.group_size
    return {
        "examples": examples, "masked": masked, "rollout": rollout, "dependency": S,
        "token_mask": loss.token_filter(S, mask), "mean": mean, "alpha": loss.shaping_factors(mean),
        "advantages": loss.group_advantages(rewards, G) if G > 1 else torch.zeros_like(rewards),
    }  # fmt: skip


def pieces(tokenizer, ids):
    """The text of each token, such that joined they are the response: a list of len(ids) strings.

    A token decoded by itself may lose its leading space, so it is decoded behind the one before it. Where a character's
    bytes are spread over tokens, the last of them gets the character and the others U+FFFD.
    """
    texts, before, start = [], 0, 0  # ids[before:start] are whole characters, ids[start:t] bytes of an unfinished one
    for t in range(len(ids)):
        known = tokenizer.decode(ids[before:start])
        text = tokenizer.decode(ids[before : t + 1])[len(known) :]
        texts.append("\ufffd" if text.endswith("\ufffd") else text)
        if not text.endswith("\ufffd"):
            before, start = start, t + 1
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------
# Shades are one hue from light to dark, so that grey print keeps their order. Long responses scroll; sections out of sight
# are not laid out.
STYLE = r"""
body { font: 16px/1.6 system-ui, sans-serif; color: #111; background: #fff; max-width: 70rem; margin: 1.5rem auto;
       padding: 0 1rem; print-color-adjust: exact; -webkit-print-color-adjust: exact }
h1 { margin: 0; font-size: 1.7rem } h2 { font-size: 1.1rem; margin: 0 0 .5rem }
section { border-top: 2px solid #111; padding: .8rem 0; margin-top: 1.2rem;
          content-visibility: auto; contain-intrinsic-size: auto 40rem }
figure { margin: 0 1rem .5rem 0; display: inline-block; vertical-align: top } figcaption { color: #444; font-size: .85rem }
img { display: block; border: 1px solid #999; max-width: 100% }
.problem { white-space: pre-wrap; max-height: 12rem; overflow: auto; margin-top: .3rem; overflow-wrap: anywhere }
p { margin: .6rem 0 }
.response { display: grid; grid-template-columns: 10.5rem 1fr; gap: 1rem; border-top: 1px solid #ccc; padding: .4rem 0 }
.facts { font-size: .85rem; line-height: 1.4; color: #333 } .facts b { font-size: 1rem; color: #111 }
.tokens { white-space: pre-wrap; line-height: 2; max-height: 24rem; overflow: auto; overflow-wrap: anywhere; padding: 0 4px }
.t { padding: 2px 1px; margin: 0 1px; border-radius: 3px; -webkit-box-decoration-break: clone; box-decoration-break: clone }
.s1 { background: #cfe1f2 } .s2 { background: #7db8da } .s3 { background: #135ba0; color: #fff }
.kept { box-shadow: 0 0 0 1px #222 } .s3.kept { box-shadow: 0 0 0 1px #fff, 0 0 0 2px #222 }
.newline::before { content: "\21b5" }
.legend .t { padding: 2px 8px; margin-right: .4rem; white-space: nowrap }
svg { margin-right: 2rem; font: 12px system-ui, sans-serif }
@media print { .problem, .tokens { max-height: none } }
"""


def page(policy, dataset, records, cfg, heading):
    """The HTML page of some evaluated prompts. records: as for `measure`; cfg: an EvalConfig; heading: a line of text."""
    found = measure(policy, dataset, records, cfg.seed, cfg.system_prompt)
    mask = found["rollout"].response_mask
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Which tokens looked at the image?</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>{STYLE}</style></head><body>
<h1>Which tokens looked at the image?</h1>
<p>The darker a token, the more the model's prediction of it changes when a random half of the image is blacked out:
it <b>looked</b>. The boxed ones, the top 40 % of each response, are those VPPO would train on.</p>
<p class="legend">{legend()}</p>
<p class="facts">{escape(heading)}. Each response: reward (1 right, 0 wrong), advantage A within its group, shaping factor
alpha over all responses of this page, mean S. S is the exact KL divergence of Eq. 3, in nats; point at a token for
its number.</p>
{"".join(section(policy, record, found, q) for q, record in enumerate(records))}
<section><h2>How S is spread</h2>
{histogram(found["dependency"][mask].tolist(), "S of a token, nats", "tokens (logarithmic)", log=True)}
{histogram(found["mean"].tolist(), "mean S of a response, nats", "responses")}
</section></body></html>
"""


def legend():
    """One sample of each shade, and of the box."""
    between = [f"{low:g} to {high:g}" for low, high in zip(LEVELS, LEVELS[1:])]
    bounds = [f"S below {LEVELS[0]:g}", *between, f"above {LEVELS[-1]:g} nat"]
    shades = "".join(f'<span class="t s{level}">{bound}</span>' for level, bound in enumerate(bounds))
    return f'{shades} <span class="t kept">boxed: kept by TGF</span>'


def section(policy, record, found, q):
    """One example: images, problem, answer, and its responses."""
    example, G = found["examples"][q], found["rollout"].group_size
    pictures = [(image, "image") for image in example.images] + [(image, "masked image") for image in found["masked"][q]]
    figures = "".join(
        f'<figure><img alt="{name}" src="{data_uri(image)}"><figcaption>{name}</figcaption></figure>' for image, name in pictures
    )
    responses = "".join(response(policy, record["rewards"][g], found, q * G + g) for g in range(G))
    return (
        f"<section><h2>{escape(record['name'])}</h2>{figures}"
        f'<div class="problem">{escape(record["problem"])}</div>'
        f"<p><b>true answer: {escape(record['answer'])}</b></p>{responses}</section>\n"
    )


def response(policy, reward, found, row):
    """One response: its numbers, and its tokens, shaded and boxed."""
    rollout, mean, alpha, advantage = found["rollout"], *(found[key][row].item() for key in ("mean", "alpha", "advantages"))
    n = int(rollout.response_mask[row].sum())
    texts = pieces(policy.processor.tokenizer, rollout.response_ids[row, :n].tolist())
    spans = ""
    for text, s, kept in zip(texts, found["dependency"][row, :n].tolist(), found["token_mask"][row, :n].tolist()):
        word = text.lstrip() or text  # the space before a word stands outside its box
        look = f"t s{sum(s >= level for level in LEVELS)}" + " kept" * kept + " newline" * (word.isspace() and "\n" in word)
        spans += f'{text[: len(text) - len(word)]}<span class="{look}" title="S {s:.4g}">{escape(word)}</span>'
    cut = "<br>cut by the length limit" if rollout.truncated[row] else ""
    facts = f"<b>reward {reward:g}</b><br>A {advantage:+.2f}, alpha {alpha:.2f}<br>mean S {mean:.3g}{cut}"
    return f'<div class="response"><div class="facts">{facts}</div><div class="tokens">{spans}</div></div>\n'


def data_uri(image):
    """A PIL image as text: shrunk to SIDE pixels, or enlarged by a whole factor, so that one sees the pixels of a small one."""
    shown = image.convert("RGB")
    shown.thumbnail((SIDE, SIDE))
    factor = max(1, SIDE // max(shown.size))
    file = io.BytesIO()
    shown.resize((shown.width * factor, shown.height * factor), 0).save(file, "JPEG", quality=90)  # 0: nearest pixel
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def histogram(values, across, up, log=False, bins=40, width=460, height=220):
    """A histogram, from 0, as SVG. across, up: what the axes show; log: a logarithmic axis of counts, from 0.5 so that 1 shows."""
    counts, edges = np.histogram(values, bins, (0, max(values) or 1))
    left, bottom, top = 50, height - 40, 10
    scale = (lambda n: math.log(max(n, 0.5) / 0.5)) if log else float
    most = counts.max()
    y = lambda n: bottom - (bottom - top) * scale(n) / scale(most)  # noqa: E731
    x = lambda value: left + (width - left - 20) * (value - edges[0]) / (edges[-1] - edges[0])  # noqa: E731
    step = (width - left - 20) / bins
    bars = "".join(
        f'<rect x="{x(edge):.1f}" y="{y(n):.1f}" width="{step - 1:.1f}" height="{bottom - y(n):.1f}"/>'
        for n, edge in zip(counts, edges)
    )
    ticks = [10**i for i in range(int(math.log10(most)) + 1)] if log else sorted({0, most // 2, most})
    marks = "".join(
        f'<text x="{left - 8}" y="{y(n) + 4:.1f}" text-anchor="end">{n:,}</text>'
        f'<path d="M{left - 4} {y(n):.1f}h4" stroke="#111"/>'
        for n in ticks
    )
    marks += "".join(
        f'<text x="{x(edge):.1f}" y="{bottom + 16}" text-anchor="middle">{edge:.2g}</text>' for edge in edges[:: bins // 4]
    )
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="{across}"><g fill="#1f6fb2">{bars}</g>{marks}'
        f'<path d="M{left} {top}V{bottom}H{width - 20}" stroke="#111" fill="none"/>'
        f'<text x="{(width + left) / 2}" y="{height - 6}" text-anchor="middle">{across}</text>'
        f'<text transform="translate(12 {height / 2 - 10}) rotate(-90)" text-anchor="middle">{up}</text></svg>'
    )


# ---------------------------------------------------------------------------------------------------------------------
# The curves of a run
# ---------------------------------------------------------------------------------------------------------------------
def curves(metrics_file, out):
    """Draw a run's metrics.jsonl as one picture of small panels; nothing happens where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which would look for a display
    except ImportError:
        return
    with open(metrics_file) as file:
        lines = [json.loads(line) for line in file]
    # (key, title, unit, key of the half width of a band and what it is)
    panels = [
        ("reward", "reward of the step's first round", "mean", None, ""),
        ("val_avg", "validation", "avg@k", "val_avg_ci", "95 % interval"),
        ("entropy", "entropy of a token", "nats", None, ""),
        ("gradient_tokens", "tokens with a gradient", "share", None, ""),
        ("dependency_mean", "mean S of a response", "nats", "dependency_std", "+- 1 standard deviation"),
    ]
    panels = [panel for panel in panels if any(line.get(panel[0]) is not None for line in lines)]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    for number, (key, title, unit, spread, meaning) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, number)
        steps = [line["step"] for line in lines if line.get(key) is not None]
        values = np.array([line[key] for line in lines if line.get(key) is not None])
        axes.plot(steps, values, "k.-", linewidth=1, markersize=4, label=key)
        if spread:
            half = np.array([line.get(spread) or 0.0 for line in lines if line.get(key) is not None])
            axes.fill_between(steps, values - half, values + half, color="0.8", label=meaning)
        if key in ("reward", "val_avg", "gradient_tokens"):
            axes.set_ylim(0, 1.02)
        axes.set(title=title, xlabel="step", ylabel=unit, xlim=(0, lines[-1]["step"] + 1))
        axes.legend(fontsize="small")
    figure.savefig(out, dpi=100)
