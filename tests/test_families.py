"""Every open family through every phase: tiny random models of the real classes (families.py), loaded from a folder like any other."""

import copy
import importlib.util
import json
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import FAMILIES, SIGHT, TEXT, TIED, build
from PIL import Image
from processes import ONE_THREAD, ROOT, python
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

import dependency
import eval as evaluation
import reward
import train
import vppo
from config import Config
from laptop import tiny
from model import Policy, load, save
from prompts import Example, encode, with_images
from rollout import generate
from speed import paths

SYSTEM = "you are helpful"


def picture(width, height):
    """Noise, always the same for a size: every patch differs from every other."""
    return Image.fromarray(np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8))


# Mixed image sizes and prompt lengths, two images in a prompt, an image in the middle of the text.
EXAMPLES = [
    Example([picture(56, 28)], "what is the digit ?", "1", "one image"),
    Example([picture(60, 90), picture(28, 28)], "what is the first digit plus the last digit ?", "2", "two images"),
    Example([picture(28, 40)], "now <image> what is it ?", "3", "in the text"),
]
TEXT_ONLY = Example([], "what is 1 plus 2 ?", "3", "no image")


@pytest.fixture(scope="module", params=[*FAMILIES, *TIED])
def folder(request, tmp_path_factory):
    if request.param == "smolvlm" and not importlib.util.find_spec("num2words"):
        pytest.skip("transformers' SmolVLM processor needs: pip install num2words")
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param, folder)
    return folder


@pytest.fixture
def policy(folder):
    return Policy(*load(str(folder)))


@pytest.fixture
def prompts(policy):
    return [encode(policy.processor, example, SYSTEM) for example in EXAMPLES]


def responses(policy, prompts, copies):
    """Random allowed tokens: response ids (B, 6) and mask with an empty response, one of one token, one of three."""
    allowed = [i for i in range(policy.model.get_input_embeddings().num_embeddings) if i not in policy.forbidden]
    ids = torch.tensor(allowed)[torch.randint(len(allowed), (copies * len(prompts), 6), generator=torch.Generator().manual_seed(0))]
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0] = False
    mask[1, 1:] = False
    mask[2, 3:] = False
    return ids, mask


def test_a_tied_head_is_the_embedding(folder, policy):
    """One matrix makes the logits and embeds the tokens. It counts as one weight, and its file has one tensor for it."""
    tied = folder.name.startswith(tuple(TIED))
    assert (policy.model.get_output_embeddings().weight is policy.model.get_input_embeddings().weight) == tied
    stored = load_file(folder / "model.safetensors")
    assert any("lm_head" in name for name in stored) == (not tied) and len(stored) == len(list(policy.parameters()))


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------
def test_every_image_is_in_the_prompt(policy, prompts):
    """Placeholders stand where the images go, and no placeholder can be sampled."""
    for example, prompt in zip(EXAMPLES, prompts):
        marks = torch.isin(prompt["input_ids"][0], torch.tensor(policy.forbidden))
        assert marks.sum() >= 3 * len(example.images)
        assert policy.processor.tokenizer.unk_token_id not in prompt["input_ids"]
    tokens = policy.processor.tokenizer.convert_ids_to_tokens(prompts[2]["input_ids"][0].tolist())
    first = next(i for i, id in enumerate(prompts[2]["input_ids"][0]) if id in policy.forbidden)
    assert tokens.index("now") < first < tokens.index(" it")


def test_masked_prompts_need_only_the_image_processor(policy, prompts):
    for i, (example, prompt) in enumerate(zip(EXAMPLES, prompts)):
        masked = dependency.mask_images(example.images, "blacken", [0, i])
        fast, slow = with_images(policy.processor, prompt, masked), encode(policy.processor, replace(example, images=masked), SYSTEM)
        assert fast.keys() == slow.keys() and all(torch.equal(fast[key], slow[key]) for key in slow)
        assert any(not torch.equal(fast[key], prompt[key]) for key in prompt)
    with pytest.raises(ValueError, match="sizes of the true ones"):
        with_images(policy.processor, prompts[1], [picture(28, 28)])


# ---------------------------------------------------------------------------------------------------------------------
# The shared prompt
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["cache", "packed"])
def test_shared_prompt_equals_plain_path(path, policy, prompts, monkeypatch):
    """Hidden states to 1e-9 in float64; gradients, through float32 logits, to 1e-6 of their norm. On the cache in several runs."""
    monkeypatch.setattr(paths, "FEW", 0)
    if path == "packed" and not policy.can_pack:
        assert "sliding_attention" in policy.model.config.get_text_config().layer_types  # Gemma 3
        pytest.skip("layers with a sliding window are not packed")
    policy.double().eval()
    prompts = [{key: value.double() if value.is_floating_point() else value for key, value in prompt.items()} for prompt in prompts]
    ids, mask = responses(policy, prompts, copies=3)
    states, gradients = [], []
    for way in (path, "plain"):
        policy.zero_grad()
        states.append(policy.states(prompts, ids, mask, way)[mask])
        logits = policy.logits(states[-1])
        logits.logsumexp(-1).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    assert states[1].std() > 0.1 and (states[0] - states[1]).abs().max() < 1e-9
    assert gradients[1].norm() > 0 and (gradients[0] - gradients[1]).norm() < 1e-6 * gradients[1].norm()


def test_the_plain_path_is_the_models_own(policy, prompts):
    """One prompt, one response, nothing padded: the log-probs of the model's own forward pass."""
    policy.eval()
    ids, _ = responses(policy, prompts, copies=1)
    for prompt, row in zip(prompts, ids):
        extra = {key: torch.zeros(1, 6, dtype=torch.long) for key in prompt if key.endswith("token_type_ids")}
        tail = {"input_ids": row[None], "attention_mask": torch.ones(1, 6, dtype=torch.long)} | extra
        whole = prompt | {key: torch.cat([prompt[key], value], dim=1) for key, value in tail.items()}
        with torch.no_grad():
            logits = policy.model(**whole).logits[0, -7:-1]
            logits[:, policy.forbidden] = -torch.inf
            expected = logits.log_softmax(-1).gather(1, row[:, None])[:, 0]
            every = torch.ones(1, 6, dtype=torch.bool)
            found = policy([prompt], row[None], every, every)[0][0]
        assert torch.allclose(found, expected, atol=1e-4)


def test_the_check_says_which_path_runs(policy, prompts, monkeypatch):
    assert "run once for its group (cache moves" in policy.check_sharing(prompts[1]) and policy.path() == "cache"
    policy.train()
    policy.model.activation_checkpointing_enable()
    note = policy.check_sharing(prompts[1])
    assert policy.path() == ("packed" if policy.can_pack else "plain") and ("packed in updates" in note) == policy.can_pack
    policy.eval()
    honest = Policy.prefill

    def forgets_positions(self, *arguments, **words):
        cache, batch, offset = honest(self, *arguments, **words)
        return cache, batch, offset - 5

    def cannot(self, *arguments, **words):
        raise NotImplementedError("no cache to repeat")

    for broken, reason in ((forgets_positions, "of the probability"), (cannot, "cache fails (no cache to repeat)")):
        monkeypatch.setattr(Policy, "prefill", broken)
        policy.share_prompt = True
        note = policy.check_sharing(prompts[1])
        assert policy.path() == "plain" and "repeated for each response" in note and reason in note


@pytest.mark.parametrize("fault", [RuntimeError("tensors on two devices"), AttributeError("no such name"), IndexError("out of range")])
def test_the_check_raises_what_is_no_refusal(fault, policy, prompts, monkeypatch):
    """A fault of the code must not end as a slower path. The sentence with it says how to go on, and going on so works."""

    def broken(self, *arguments, **words):
        raise fault

    monkeypatch.setattr(Policy, "prefill", broken)
    with pytest.raises(type(fault), match=str(fault)) as caught:
        policy.check_sharing(prompts[1])
    assert any("'cache'" in note and "--no_share_prompt" in note for note in caught.value.__notes__)
    policy.share_prompt = False
    assert policy.check_sharing(prompts[1]) == "a prompt is repeated for each response"


def test_recurrent_layers_share_no_prompt():
    """Qwen3.5's linear attention keeps a state that runs along, and no keys and values that several responses could read."""
    dims = dict(TEXT, vocab_size=70, num_hidden_layers=4)
    sight = dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32, patch_size=14)
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING["qwen3_5"](text_config=dims, vision_config=sight))
    policy = Policy(model, tiny.build_processor())
    assert not policy.share_prompt and policy.path() == "plain"
    assert policy.check_sharing({"input_ids": torch.arange(20, 30)[None], "attention_mask": torch.ones(1, 10).long()}).endswith("each response")


def test_a_sliding_window_without_layer_types_is_not_packed(tmp_path):
    """Mistral's config names a window and no layer types; the window would begin to matter only in long responses."""
    build("llava", tmp_path, model_type="mistral", sliding_window=40)
    policy = Policy(*load(str(tmp_path)))
    assert not policy.can_pack
    policy.train()
    policy.model.activation_checkpointing_enable()
    assert policy.path() == "plain"


def test_the_check_compares_two_different_rows(policy, prompts):
    """Qwen ships its padding token as one of its end tokens."""
    seen = []
    honest = policy.token_states
    policy.token_states = lambda prompts, ids, *rest: seen.append(ids) or honest(prompts, ids, *rest)
    policy.eos_ids = [policy.pad_id, *policy.eos_ids]
    policy.train()
    policy.model.activation_checkpointing_enable()
    paths_used = 2 + policy.can_pack  # plain, on the cache, and packed where updates need it
    policy.check_sharing(prompts[0])
    assert len(seen) == paths_used and not any(torch.equal(ids[0], ids[1]) for ids in seen)


def test_a_head_that_scales_its_logits_keeps_its_own_forward():
    """Granite 4 Vision divides its logits by a constant: the output matrix alone would give another distribution."""
    text = dict(TEXT, vocab_size=70, logits_scaling=4.0)
    vision = dict(SIGHT, hidden_size=64, image_size=28, patch_size=7)
    kind = CONFIG_MAPPING["granite4_vision"]
    config = kind(text_config=text, vision_config=vision, deepstack_layer_map=[], spatial_target_layers=[], downsample_rate="1/2")
    torch.manual_seed(0)
    policy = Policy(AutoModelForImageTextToText.from_config(config), tiny.build_processor())
    states = torch.randn(3, 32, requires_grad=True)
    allowed = [i for i in range(70) if i not in policy.forbidden]
    expected = policy.model.lm_head(states)[:, allowed] / 4
    assert not policy.plain_head and torch.allclose(policy.logits(states)[:, allowed], expected, atol=1e-6)
    ours, theirs = (torch.autograd.grad(x.square().sum(), states)[0] for x in (policy.logits(states)[:, allowed], expected))
    assert torch.allclose(ours, theirs, atol=1e-6) and "forward" not in vars(policy.model.base_model)
    assert Policy(tiny.build_model(policy.processor, **tiny.RECIPE), policy.processor).plain_head


# ---------------------------------------------------------------------------------------------------------------------
# The phases
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rollouts_do_not_depend_on_the_path(dtype, policy, prompts):
    """With the same random numbers the shared prompt and the repeated one, growing and static caches sample the same responses.

    In bfloat16 to the bit, if the attention kernel rounds in the same way however many masked tokens follow the real ones.
    """
    samples, policy.compute_dtype = [], dtype
    for policy.share_prompt, policy.static_cache in ((True, False), (False, False), (True, True), (False, True)):
        torch.manual_seed(0)
        with sdpa_kernel(SDPBackend.MATH):
            samples.append(generate(policy, prompts, 4, max_new_tokens=8))
    assert all(torch.equal(samples[0].response_ids, other.response_ids) for other in samples[1:])
    assert not torch.isin(samples[0].response_ids, torch.tensor(policy.forbidden)).any()
    assert len({tuple(row.tolist()) for row in samples[0].response_ids}) > 6


def test_pixels_matter(policy, prompts):
    """A masked image changes what the policy expects: S > 0; the image itself in its place: S = 0."""
    rollout = generate(policy, prompts, 2, max_new_tokens=6)
    masked = [
        with_images(policy.processor, prompt, dependency.mask_images(example.images, "grey", [0, i]))
        for i, (prompt, example) in enumerate(zip(prompts, EXAMPLES))
    ]
    S = dependency.score(policy, rollout, masked)["dependency"][rollout.response_mask]
    assert S.mean() > 1e-4
    assert dependency.score(policy, rollout, prompts)["dependency"].max() < 1e-6


def test_a_training_step(folder, tmp_path, monkeypatch):
    """train_step on mixed rows, a text-only one among them: finite, and vision tower, connector and language model all move."""
    monkeypatch.setattr(reward, "grade", lambda text, *_: float(len(text) % 2))  # random models never answer right
    for method, extra in (("vppo", {}), ("dapo", {"entropy_penalty": 0.01})):
        policy = Policy(*load(str(folder))).train()
        before = copy.deepcopy(policy.state_dict())
        sizes = dict(prompts_per_step=4, group_size=4, max_new_tokens=8, system_prompt=SYSTEM, tokens_per_batch=300, max_rounds=1)
        cfg = Config(method=method, lr=1e-2, **sizes, **extra)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr)
        metrics, position, batch = vppo.train_step(policy, optimizer, [*EXAMPLES, TEXT_ONLY], cfg, 0, 0)
        assert position == 4 and metrics["grad_norm"] > 0 and np.isfinite(metrics["loss"])
        moved = {name for name, value in policy.state_dict().items() if not torch.equal(value, before[name])}
        for part in ("vision|visual", "language_model|text_model", "lm_head"):
            assert any(word in name for name in moved for word in part.split("|")), part
        rows = [example.name for example in batch.examples for _ in range(4)]
        if method == "vppo":
            S = batch.dependency.sum(dim=1)
            assert all((S[row] < 1e-6) == (name == "no image") for row, name in enumerate(rows))
        assert torch.allclose(batch.old_logprobs, dependency.score(Policy(*load(str(folder))), batch.rollout)["logprobs"], atol=1e-4)
    save(policy, tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    again = Policy(*load(str(tmp_path / "saved")))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in policy.state_dict().items())
    prompt = encode(again.processor, EXAMPLES[1], SYSTEM)
    original = encode(policy.processor, EXAMPLES[1], SYSTEM)
    assert all(torch.equal(prompt[key], original[key]) for key in original)


def write_rows(folder):
    """The examples as a data folder."""
    folder.mkdir(parents=True)
    rows = []
    for i, example in enumerate(EXAMPLES):
        names = [f"{i}-{n}.png" for n in range(len(example.images))]
        for name, image in zip(names, example.images):
            image.save(folder / name)
        rows.append({"file_names": names, "problem": example.problem, "answer": example.answer})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


COMMON = ["--data", "rows", "--instruction", "", "--system_prompt", SYSTEM, "--max_new_tokens", "6"]
STEP = ["--steps", "1", "--prompts_per_step", "4", "--group_size", "2", "--max_rounds", "1", "--method", "vppo_grpo"]


def test_the_scripts(folder, tmp_path, monkeypatch):
    """train.py on a folder of pictures, then eval.py on its checkpoint."""
    write_rows(tmp_path / "rows" / "train")
    monkeypatch.chdir(tmp_path)
    train.main(["--model", str(folder), "--output", "run", *COMMON, *STEP])
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line["step"] == 1 and line["prompts_sampled"] == 4
    evaluation.main(["--model", "run/checkpoints/step-000001", "--split", "train", "--samples", "2", "--output", "scores", *COMMON])
    assert json.loads((tmp_path / "scores" / "eval.json").read_text())["prompts"] == 3


@pytest.mark.slow
def test_weights_that_nothing_reads_do_not_stop_several_processes(tmp_path):
    """LLaVA leaves its tower's last layers unused: DDP must not wait for their gradients. DDP and FSDP2 agree."""
    build("llava", tmp_path / "llava")
    write_rows(tmp_path / "rows" / "train")
    norms = []
    for flags in ([], ["--shard"]):
        words = ["--model", "llava", "--output", f"run{len(flags)}", "--entropy_penalty", "0.1", *COMMON, *STEP, *flags]
        command = [*python(2), str(ROOT / "train.py"), *words]
        subprocess.run(command, check=True, cwd=tmp_path, env=ONE_THREAD, capture_output=True, timeout=200)
        norms.append(json.loads((tmp_path / f"run{len(flags)}" / "metrics.jsonl").read_text())["grad_norm"])
    assert norms[0] > 0 and norms[1] == pytest.approx(norms[0], rel=1e-5)
