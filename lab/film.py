"""Two pictures of a model that looks: a film of it learning to (assets/film.webp), and one moment in detail (assets/spotlight.svg).

    python -m lab.film                        the film: three minutes on 2 cores, once the tiny model is warmed up
    python -m lab.film --spotlight            the picture: half a minute
    python -m lab.film --quick                two steps and small frames, into runs/: does everything run?

The film shows one held-out scene at steps 0, 5, 10, ... of the run that `python train.py` with the same flags makes. A frame has the first
of 8 responses, its tokens shaded by S (Eq. 3). The scene is the first whose first response is wrong before training while all 8 are right
after it. That is a choice by outcome: it shows what success looks like. The curves tell how often it comes. They are over all 8 responses
to each of 32 held-out scenes: the share that is right, and the share that looked, which means that a token has S above 1 nat.

The picture shows two right responses to one question before training. The reader names all three digits as they are, the guesser names
none. Question and responses are the first of this sort among 16 x 8; S plays no part in the choice. Boxes are the token mask m (Eq. 4).
Alpha (Eq. 5) compares all 128 responses. The same versions of the libraries on the same machine draw the same pictures.
"""

import base64
import io
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

# What this file needs of the project, in one place.
import dependency
import report
from config import Config, check, command_line, option
from eval import evaluate
from laptop import tiny
from laptop.digits import WORDS, Digits, is_reading
from model import Policy, load
from vppo import train_step

LEVELS = report.LEVELS  # S where the next darker shade begins
RANGES = ["0.01 to 0.1", "0.1 to 1", "above 1"]  # the same as text
GROUND, INK, SOFT, GRID, GOOD, BAD, BLUE = "#ffffff", "#1f2328", "#57606a", "#d0d7de", "#1a7f37", "#c0261c", "#135ba0"
SHADES = [(GROUND, INK), ("#cfe1f2", INK), ("#7db8da", INK), (BLUE, GROUND)]  # of a token and of its letters, by level


class Word(NamedTuple):
    """One token as it is drawn."""

    text: str  # with the space before it
    S: float
    kept: bool  # by the token mask

    @property
    def level(self):
        """Its shade: 0 (none) to 3."""
        return sum(self.S >= level for level in LEVELS)


# ---------------------------------------------------------------------------------------------------------------------
# Responses and their numbers
# ---------------------------------------------------------------------------------------------------------------------
def answers(policy, dataset, cfg, scenes):
    """Answer the first `scenes` examples cfg.group_size times each: a dict a response, group after group. Alpha compares all of them."""
    _, records = evaluate(policy, dataset, cfg, scenes, cfg.group_size, cfg.seed, None, with_ids=scenes)
    found = report.measure(policy, dataset, records, cfg.seed)
    rewards, tokenizer = [reward for record in records for reward in record["rewards"]], policy.processor.tokenizer
    responses = []
    for row, n in enumerate(found["rollout"].response_mask.sum(dim=1).tolist()):
        texts = report.pieces(tokenizer, found["rollout"].response_ids[row, :n].tolist())
        texts = [printable(text.replace(tokenizer.eos_token, " (end)")) for text in texts]
        S, kept = (found[key][row, :n].tolist() for key in ("dependency", "token_mask"))
        numbers = {key: found[key][row].item() for key in ("mean", "alpha", "advantages")}
        named = [text.strip() for text in texts if is_reading(text)]
        words = [Word(*word) for word in zip(texts, S, kept)]
        response = {"scene": row // cfg.group_size, "words": words, "reward": rewards[row], "looked": max(S) >= LEVELS[-1], "named": named}
        responses.append(response | numbers)
    return responses


def printable(text):
    """Responses are text nobody vouches for: what is no visible character becomes one."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def share(responses, key):
    """The share of responses that are right ("reward") or looked."""
    return sum(response[key] for response in responses) / len(responses)


def film(policy, cfg, every, scenes):
    """Train, and look every few steps. Returns the frames: dicts of step and responses (`answers`)."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    frames, position = [], 0
    for step in tqdm(range(cfg.steps + 1), "film", disable=None):
        if step % every == 0 or step == cfg.steps:
            frames.append({"step": step, "responses": answers(policy, Digits("test"), cfg, scenes)})
        if step < cfg.steps:
            _, position, _ = train_step(policy, optimizer, Digits("train"), cfg, step, position)
    return frames


def choose_scene(frames, group_size):
    """The first scene whose first response is wrong in the first frame, while all are right in the last; 0 if there is none."""
    before, after = (frame["responses"] for frame in (frames[0], frames[-1]))
    starts = range(0, len(before), group_size)
    good = [i for i in starts if before[i]["reward"] < 1 and share(after[i : i + group_size], "reward") == 1]
    return good[0] // group_size if good else 0


def choose_pair(responses, dataset):
    """(reader, guesser): right responses to the first question that has both."""
    for scene in range(responses[-1]["scene"] + 1):
        right = [response for response in responses if response["scene"] == scene and response["reward"] == 1]
        digits = [WORDS[digit] for digit in dataset[scene].digits]
        pair = [next((response for response in right if response["named"] == named), None) for named in (digits, [])]
        if all(pair):
            return pair
    raise ValueError("no question has both a right reader and a right guesser: take another --seed")


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------
def flow(words, width_of, width, gap):
    """Set words in lines no wider than `width`: [(word, its text without spaces, x, line, its own width)]."""
    placed, x, line = [], 0.0, 0
    for word in words:
        text = word.text.strip() or word.text
        own = width_of(text)
        x += gap if word.text[:1] == " " else gap / 2  # a token in the middle of a word stands closer to the one before it
        if x + own > width:
            x, line = gap, line + 1
        placed.append((word, text, x, line, own))
        x += own
    return placed


def views(example, cfg, number):
    """What stands above the responses: the question without its instruction, the image, and the masked image S is measured with."""
    masked = dependency.mask_images(example.images, "blacken", [cfg.seed, number, 0])
    return example.problem.removesuffix(" answer in \\boxed{}"), example.images[0], masked[0]


def draw(frames, number, scene, cfg):
    """Frame `number` of the film: a card with its own ground, readable on light and dark pages."""
    example, G, width, side = Digits("test")[scene], cfg.group_size, 720, 326
    question, *images = views(example, cfg, scene)
    font = {size: ImageFont.load_default(size=size) for size in (21, 24, 30)}
    lay = [flow(frame["responses"][scene * G]["words"], lambda text: font[24].getlength(text) + 8, width - 48, 6) for frame in frames]
    lines = 1 + max(placed[-1][3] for placed in lay)  # the same in all frames, so that nothing jumps
    high, frame, last = side * images[0].height // images[0].width, frames[number], max(1, frames[-1]["step"])
    card = Image.new("RGB", (width, 474 + high + 36 * lines), GROUND)
    pen, responses = ImageDraw.Draw(card), frame["responses"]
    pen.rectangle((0, 0, card.width - 1, card.height - 1), outline=GRID, width=2)

    def put(x, y, text, size=21, color=INK, anchor="ls"):
        pen.text((x, y), text, color, font[size], anchor)

    put(24, 48, "A model learns to look", 30)
    put(width - 24, 48, f"step {frame['step']} of {last}", 30, BLUE, "rs")
    put(24, 86, question)
    put(width - 24, 86, f"true answer: {example.answer}", 21, SOFT, "rs")
    for x, image, name in zip((24, width - 24 - side), images, ("the image", "the masked image, to measure S")):
        card.paste(image.resize((side, high), Image.Resampling.NEAREST), (x, 102))
        pen.rectangle((x, 102, x + side, 102 + high), outline=SOFT)
        put(x, 126 + high, name, color=SOFT)
    y = 172 + high
    for word, text, x, line, own in lay[number]:
        pen.rounded_rectangle((20 + x, y + 36 * line - 24, 20 + x + own, y + 36 * line + 7), 5, SHADES[word.level][0])
        put(24 + x, y + 36 * line, text, 24, SHADES[word.level][1])
    y += 36 * lines
    put(24, y, "S of a token, in nats", color=SOFT)
    for x, words, (ground, ink) in zip((230, 364, 464), RANGES, SHADES[1:]):
        pen.rounded_rectangle((x, y - 21, x + font[21].getlength(words) + 14, y + 7), 5, ground)
        put(x + 7, y, words, color=ink)
    own, y = responses[scene * G : scene * G + G], y + 44
    put(24, y, "right, reward 1" if own[0]["reward"] else "wrong, reward 0", 24, GOOD if own[0]["reward"] else BAD)
    put(width - 30 - 22 * G, y, f"all {G} responses to it", color=SOFT, anchor="rs")
    for g, response in enumerate(own):
        dot = (width - 24 - 22 * (G - g), y - 15, width - 8 - 22 * (G - g), y + 1)
        pen.ellipse(dot, GOOD if response["reward"] else None, GOOD if response["reward"] else BAD, 2)

    left, base, across, up = 82, card.height - 44, 380, 110  # the curves
    put(24, base - up - 28, f"all responses to {len(responses) // G} held-out scenes; looked: a token has S above 1", color=SOFT)
    for part in (0, 0.5, 1):
        pen.line((left, base - up * part, left + across, base - up * part), GRID)
        put(left - 8, base - up * part + 6, f"{part:.0%}", color=SOFT, anchor="rs")
    put(left, base + 26, "step 0", color=SOFT)
    put(left + across, base + 26, f"step {last}", color=SOFT, anchor="rs")
    for key, color, name, at in (("looked", BLUE, "looked", base - 74), ("reward", GOOD, "are right", base - 22)):
        points = [(left + across * f["step"] / last, base - up * share(f["responses"], key)) for f in frames[: number + 1]]
        pen.line(points, color, 3)
        pen.ellipse([edge for d in (-6, 6) for edge in (points[-1][0] + d, points[-1][1] + d)], color)
        put(570, at, f"{share(responses, key):.0%}", 30, color, "rs")
        put(582, at, name, 24, color)
    return card


# The card of the picture is dark where the reader prefers that.
STYLE = """
  .card { fill: #fff; stroke: #d0d7de } .band { fill: #f6f8fa; stroke: #d0d7de } .kept, .frame { fill: none; stroke: #1f2328 }
  text { fill: #1f2328 } .soft { fill: #57606a; font-size: 13px } .bold { font-weight: 700 } image { image-rendering: pixelated }
  .s1 { fill: #cfe1f2 } .s2 { fill: #7db8da } .s3 { fill: #135ba0 } .on2 { fill: #111 } .on3 { fill: #fff }
  .token { font-family: ui-monospace, Menlo, Consolas, monospace }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117; stroke: #3d444d } .band { fill: #161b22; stroke: #3d444d } .kept, .frame { stroke: #e6edf3 }
    text { fill: #e6edf3 } .soft { fill: #a3acb6 } .s1 { fill: #1d3a5c } .s2 { fill: #2f6fab } .s3 { fill: #9ccbff }
    .on2 { fill: #fff } .on3 { fill: #0d1117 }
  }
"""


def spotlight(pair, example, cfg):
    """The picture as SVG text: an image, true and masked, and two responses to it."""
    out, width = [], 500
    question, *images = views(example, cfg, pair[0]["scene"])

    def put(x, y, text, kind="", more=""):
        out.append(f'<text x="{x:g}" y="{y:g}" class="{kind}" {more}>{escape(text)}</text>')

    def box(x, y, wide, high, kind):
        out.append(f'<rect x="{x:g}" y="{y:g}" width="{wide:g}" height="{high:g}" rx="4" class="{kind}"/>')

    put(20, 30, "Two right answers to one question", "bold", 'font-size="17"')
    put(20, 52, question)
    put(width - 20, 52, f"true answer: {example.answer}", "soft", 'text-anchor="end"')
    for x, image, name in zip((20, 260), images, ("the image", "the masked image, to measure S")):
        file = io.BytesIO()
        image.convert("L").save(file, "PNG", optimize=True)
        uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        put(x, 76, name, "soft")
        high = 220 * image.height / image.width
        out.append(f'<image x="{x}" y="84" width="220" height="{high:g}" href="{uri}"/>')
        box(x, 84, 220, high, "frame")
    y = 100 + high
    for title, response in zip(("It reads the digits", "It guesses"), pair):
        placed = flow(response["words"], lambda text: 8.4 * len(text) + 6, width - 44, 8)
        high = 119 + 27 * placed[-1][3]
        box(12.5, y, width - 25, high, "band")
        put(28, y + 24, title, "bold")
        for word, text, x, line, own in placed:
            at = y + 54 + 27 * line
            if word.kept:
                box(x + 18, at - 17, own + 4, 24, "kept")
            if word.level:
                box(x + 20, at - 15, own, 20, f"s{word.level}")
            put(x + 23, at, text, f"token on{word.level}", f'textLength="{own - 6:g}" lengthAdjust="spacingAndGlyphs"')
        alpha, A = response["alpha"], response["advantages"]
        facts = {"reward": f"{response['reward']:g}", "advantage A": f"{A:+.2f}", "mean S": f"{response['mean']:.3f}",
                 "α": f"{alpha:.2f}", "α × A": f"{alpha * A:+.2f}"}  # fmt: skip
        for x, (name, value) in zip((28, 112, 228, 324, 404), facts.items()):
            put(x, y + high - 31, name, "soft")
            put(x, y + high - 12, value, "bold")
        y += high + 10
    put(20, y + 18, "S of a token, in nats", "soft")
    for x, own, words, kind in zip((158, 253, 325, 398), (89, 66, 67, 82), (*RANGES, "boxed: kept"), ("s1", "s2", "s3", "kept")):
        box(x, y + 3, own, 21, kind)
        put(x + own / 2, y + 18, words, "on" + kind[1:], 'text-anchor="middle" font-size="13"')
    more = pair[0]["alpha"] / pair[1]["alpha"]
    for line in ("S: how much the prediction of a token changes with the masked image.", "Both are right, so both have the same reward and advantage.",
                 f"The reader has more S, so α lets it count {more:.2f} times as much.",
                 "Boxed tokens, the top 40 % by S of each response, get a gradient."):  # fmt: skip
        put(20, y + 46, line, "soft")
        y += 21
    size = f'viewBox="0 0 {width} {y + 44:g}" width="{width}" height="{y + 44:g}" font-size="14"'
    card = f'<rect class="card" x=".5" y=".5" width="{width - 1}" height="{y + 43:g}" rx="10"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="system-ui, -apple-system, Helvetica, Arial, sans-serif">\n'
        f"<title>Two right answers to one question: one reads the image, one guesses. Tokens are shaded by S.</title>\n"
        f"<style>{STYLE}</style>\n{card}\n" + "\n".join(out) + "\n</svg>\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Flags:
    """Flags of lab/film.py."""

    method: str = option("vppo", "as of train.py")
    seed: int = option(0, "of the training run, of sampling and of the masks")
    steps: int = option(50, "steps of the training run")
    every: int = option(5, "steps from frame to frame")
    output: str = option("", "the file; default assets/film.webp, with --quick runs/film.webp, with --spotlight assets/spotlight.svg")
    spotlight: bool = option(False, "draw the picture instead of the film")
    quick: bool = option(False, "of the film two steps and small frames")


def main(argv=None):
    """The command line."""
    flags = command_line(Flags, __doc__).parse_args(argv)
    ending = ".svg" if flags.spotlight else ".webp"
    output = Path(flags.output or ("runs/" if flags.quick else "assets/") + ("spotlight" if flags.spotlight else "film") + ending)
    if flags.every < 1 or output.suffix != ending:
        raise ValueError(f"--every must be at least 1 and --output end with {ending}, got {flags.every} and {output}")
    cfg = Config(method=flags.method, seed=flags.seed, steps=flags.steps)
    if flags.quick and not flags.spotlight:
        cfg.steps, cfg.prompts_per_step, cfg.group_size, cfg.max_rounds, flags.every = min(2, flags.steps), 2, 2, 1, 1
    check(cfg)
    policy = Policy(*load(tiny.ensure()[0])).train()
    output.parent.mkdir(parents=True, exist_ok=True)
    if flags.spotlight:
        pair = choose_pair(answers(policy, Digits("test"), cfg, 16), Digits("test"))
        output.write_text(spotlight(pair, Digits("test")[pair[0]["scene"]], cfg), encoding="utf-8")
        shown = zip(("reader", "guesser"), pair)
    else:
        frames = film(policy, cfg, flags.every, 2 if flags.quick else 32)
        scene = choose_scene(frames, cfg.group_size)
        cards = [draw(frames, number, scene, cfg) for number in range(len(frames))]
        if flags.quick:
            cards = [card.resize((card.width // 4, card.height // 4)) for card in cards]
        wait = [1000 + 1000 * (card is cards[0]) + 3000 * (card is cards[-1]) for card in cards]  # milliseconds
        cards[0].save(output, save_all=True, append_images=cards[1:], duration=wait, loop=0, lossless=True, method=6)
        shown = [(f"step {f['step']:3}: right {share(f['responses'], 'reward'):.3f}, looked {share(f['responses'], 'looked'):.3f}",
                  f["responses"][scene * cfg.group_size]) for f in frames]  # fmt: skip
    for name, response in shown:
        numbers = ", ".join(f"{key} {response[key]:.3g}" for key in ("reward", "advantages", "mean", "alpha"))
        print(f"{name}: test[{response['scene']}] {numbers}: {''.join(word.text for word in response['words'])}")
    print(f"{output} written, {output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"lab.film: {error}")
    except KeyboardInterrupt:
        sys.exit("lab.film: stopped; nothing was written")
