"""The memory estimate: small models worked out by hand, and the activation formula against what autograd keeps."""

import contextlib
from pathlib import Path

import pytest
import torch
from families import build
from PIL import Image
from transformers import AutoModelForImageTextToText, LlavaConfig, Qwen2_5_VLConfig

import dryrun
import model as model_module
from config import Config
from dryrun import MODELS, count_parameters, count_trained, layer_bytes, memory_at, memory_per_gpu, qwen
from lab import bench
from lab.bench import peak_memory
from model import Policy, add_adapter, load
from prompts import Example, encode
from rollout import Rollout, generate
from vppo import Batch, measure, modulate, update

GIB = 2**30
# Parameters of `small`, by hand.
# A text layer: q 8x8+8, k and v 8x4+4 each, o 8x8, gate, up, down 3x8x16, two norms of 8.
LAYER = 72 + 36 + 36 + 64 + 384 + 16  # 608
# The vision layer: two norms, qkv 8x24+24, proj 8x8+8, gate and up 8x16+16 each, down 16x8+8.
TOWER = 16 + 216 + 72 + 144 + 144 + 136  # 728
# The rest: patches 3x2x14x14 -> 8; merger (norm of 8, 32x32+32, 32x8+8); embeddings, head, last norm.
ROOT = 9408 + (8 + 1056 + 264) + 32 * 8 + 32 * 8 + 8  # 11,256
TOTAL = 2 * LAYER + TOWER + ROOT  # 13,200


def small(layers=2, hidden=8, heads=2, intermediate=16, depth=1):
    """A Qwen2.5-VL of a few thousand weights, one key/value head per two query heads."""
    return Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
            intermediate_size=intermediate, vocab_size=32, pad_token_id=None, bos_token_id=None, eos_token_id=None,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1]),
        ),
        vision_config=dict(depth=depth, hidden_size=8, num_heads=2, intermediate_size=16, out_hidden_size=hidden),
    )  # fmt: skip


# Prompts of 4 + 2 tokens, responses of 10, two a group: one group costs 6 + 2 x 10 = 26 tokens.
WORK = dict(image_tokens=4, text_tokens=2, response_tokens=10, group_size=2, tokens_per_batch=26, responses_at_once=4, k=0.4)


def at(config, *gpus, **work):
    """Memory at exactly these lengths."""
    trained = count_trained(config, work.get("lora_rank", 0), work.get("freeze", ""))
    return memory_at(config, *gpus, weights=count_parameters(config), trained=trained, **work)


def in_bytes(phase):
    """{part: bytes} of a phase."""
    return {part: round(size * GIB) for part, size in phase.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------
def test_parameters_by_hand():
    assert (LAYER, TOWER, TOTAL, ROOT) == (608, 728, 13_200, 11_256)
    assert count_parameters(small()) == (TOTAL, ROOT, TOWER)  # in so small a model the vision layer is the larger one


@pytest.mark.parametrize("name, weights", [("3B", 3.75e9), ("7B", 8.29e9), ("32B", 33.45e9)])
def test_published_sizes(name, weights):
    total, root, unit = count_parameters(qwen(**MODELS[name])[0])
    assert total == pytest.approx(weights, rel=0.01)
    text = dict(zip(dryrun.TEXT, MODELS[name]["text"]))
    tables = (1 if name == "3B" else 2) * text["vocab_size"] * text["hidden_size"]  # tied embeddings are one table
    merger = 5120 * 5120 + 5120 * text["hidden_size"]
    assert root == pytest.approx(tables + merger, rel=0.01)
    assert total - root - text["num_hidden_layers"] * unit == pytest.approx(0.63e9, rel=0.05)  # the vision layers


def test_master_weights_gradients_and_adam():
    sizes = memory_per_gpu(small(), **WORK)
    for phase in ("rollout", "score", "update"):
        found = in_bytes(sizes[phase])
        assert (found["parameters"], found["adam"]) == (52_800, 105_600)
        assert found.get("gradients") == (52_800 if phase == "update" else None)
        assert found["total"] == sum(size for part, size in found.items() if part != "total")
    assert sizes["peak"] == max(sizes[phase]["total"] for phase in ("rollout", "score", "update"))


def test_sharding_divides_by_gpus_and_replicas_add_buckets():
    cases = [(1, False), (8, False), (8, True)]
    one, replicas, sharded = (memory_per_gpu(small(), gpus, shard, **WORK) for gpus, shard in cases)
    copy = {"ddp buckets": pytest.approx(4 * TOTAL / GIB), "total": pytest.approx(one["update"]["total"] + 4 * TOTAL / GIB)}
    assert one["update"]["ddp buckets"] == 0 and replicas["update"] == one["update"] | copy
    for part in ("parameters", "gradients", "adam"):
        assert sharded["update"][part] == pytest.approx(one["update"][part] / 8)
    assert sharded["update"]["logits"] == one["update"]["logits"]


def test_compute_weights():
    for bf16, shard, whole, updating, gradients in [
        (True, False, 2 * TOTAL, 2 * TOTAL, 0),  # autocast's copy
        (False, False, 0, 0, 0),
        (True, True, 2 * TOTAL, 2 * (ROOT + 2 * TOWER), 2 * (ROOT + TOWER)),  # whole to generate; then root and two layers
        (False, True, 4 * TOTAL, 4 * (ROOT + 2 * TOWER), 4 * (ROOT + TOWER)),
    ]:
        sizes = memory_per_gpu(small(), 2, shard, bf16=bf16, **WORK)
        assert in_bytes(sizes["rollout"])["compute weights"] == in_bytes(sizes["score"])["compute weights"] == whole
        assert in_bytes(sizes["update"])["compute weights"] == updating
        assert in_bytes(sizes["update"])["unsharded gradients"] == gradients


# Weights of `small` that an adapter of rank 1 has: in each of two layers q and o 8 + 8, k and v 8 + 4, gate, up and down 8 + 16.
RANK = 2 * (2 * 16 + 2 * 12 + 3 * 24)  # 256


def test_trained_weights_by_hand():
    vision = TOWER + 9408 + (8 + 1056 + 264)
    assert count_trained(small()) == TOTAL and count_trained(small(), lora_rank=5) == 5 * RANK
    assert count_trained(small(), part="vision") == TOTAL - vision and count_trained(small(), part="language") == vision


def test_an_adapter_takes_16_bytes_a_weight_and_the_model_2():
    rank, moving = 3, 3 * RANK
    for bf16, size in ((True, 2), (False, 4)):
        for gpus, shard in ((1, False), (4, False), (4, True)):
            sizes = memory_per_gpu(small(), gpus, shard, lora_rank=rank, bf16=bf16, **WORK)
            parts, share = in_bytes(sizes["update"]), gpus if shard else 1
            assert parts["parameters"] == (size * TOTAL + 4 * moving) / share
            assert (parts["gradients"], parts["adam"]) == (4 * moving / share, 8 * moving / share)
            assert parts["ddp buckets"] == (4 * moving if gpus > 1 and not shard else 0)
            # autocast copies the adapter alone, for the rest is bfloat16 already; FSDP gathers all
            assert in_bytes(sizes["rollout"])["compute weights"] == (size * (TOTAL + moving) if shard else 2 * moving if bf16 else 0)


def test_a_frozen_part_has_no_gradient_and_no_states():
    sizes = in_bytes(at(small(), freeze="vision", **WORK)["update"])
    language = 2 * LAYER + 2 * 256 + 8
    assert (sizes["parameters"], sizes["gradients"], sizes["adam"]) == (4 * TOTAL, 4 * language, 8 * language)
    whole = in_bytes(at(small(), **WORK)["update"])
    # Trained, the tower keeps 6,400 bytes beside those of the 26 tokens and the pixels. Frozen, its own pass takes the most: 16 x 432 and the pixels.
    assert whole["activations"] == 26 * 2 * 432 + 768 + 6400 + 75_264 and sizes["activations"] == 16 * 432 + 75_264


def test_offloaded_states_are_there_in_the_optimizers_step_alone():
    config, work = qwen(**MODELS["7B"])
    here, away = (memory_per_gpu(config, 8, True, offload_optimizer=away, **work) for away in (False, True))
    for phase in ("rollout", "score"):
        assert away[phase]["adam"] == 0 and here[phase]["total"] - away[phase]["total"] == pytest.approx(here[phase]["adam"])
    update = away["update"]
    step = update["total"] - sum(update[part] for part in ("activations", "logits", "vocabulary's gradients"))  # while the optimizer takes its step
    assert update["total"] == pytest.approx(max(here["update"]["total"] - here["update"]["adam"], step - update["adam"] + here["update"]["adam"]))
    tight = memory_per_gpu(small(), offload_optimizer=True, **WORK | {"image_tokens": 1, "text_tokens": 5})["update"]  # few tokens: the step takes the most
    parts = in_bytes(tight)
    assert 0 < parts["adam"] < 8 * TOTAL and parts["total"] == 16 * TOTAL + 2 * TOTAL  # weights, gradients, states; bfloat16 copies


# ---------------------------------------------------------------------------------------------------------------------
# What grows with tokens
# ---------------------------------------------------------------------------------------------------------------------
def test_kv_cache_and_logits_by_hand():
    sizes = at(small(), **WORK)
    # 2 layers x (keys, values) x 1 head x size 4 x 2 bytes = 32 bytes a token. The prompt's 6 tokens, and of 2 x 16 in one of two layers two copies.
    assert in_bytes(sizes["score"])["kv cache"] == in_bytes(at(small(), 8, True, **WORK)["score"])["kv cache"] == (6 + 32) * 32
    assert in_bytes(at(small(), bf16=False, **WORK)["score"])["kv cache"] == 2 * (6 + 32) * 32  # float32
    assert in_bytes(at(small(), share_prompt=False, **WORK)["score"])["kv cache"] == 0
    # 20 response tokens, 8 of them kept, rows of 32 x 4 bytes
    assert in_bytes(sizes["update"])["logits"] == 4 * 8 * 128
    assert in_bytes(sizes["score"])["logits"] == 8 * 20 * 128
    # 8 x 32 numbers in the head: two float32 gradients of it, one of them first in bfloat16; sharded, it stays so. Frozen: none.
    cases = [(10, {}), (10, {"activation_checkpointing": True}), (8, {"bf16": False}), (6, {"gpus": 8, "shard": True}), (0, {"lora_rank": 2}), (0, {"freeze": "language"})]
    for size, flags in cases:
        assert in_bytes(at(small(), **flags, **WORK)["update"])["vocabulary's gradients"] == 256 * size
    # A vocabulary of 100,000 and one token with a gradient: on a cache three gradients of the embeddings are more than the rest of the pass.
    wide = small()
    wide.text_config.vocab_size = 100_000
    sizes = in_bytes(at(wide, **WORK | {"k": 0.05, "bf16": False})["update"])
    assert sizes["vocabulary's gradients"] + sizes["activations"] + sizes["logits"] == 3 * 4 * 800_000


def test_no_more_than_a_chunk_of_logits_is_alive_in_an_update():
    config, work = qwen(**MODELS["7B"])
    few, many = (at(config, **work | dict(tokens_per_batch=n))["update"]["logits"] for n in (8192, 65536))
    assert few == many and 0.99 * 4 * 2**28 < many * GIB <= 4 * 2**28  # 4 tensors of at most 2^26 float32


def test_a_rollout_by_hand():
    """Two prompts and four responses in a call. With responses of 10 it is largest when it reads the prompts, with 100 at its end."""

    def rollout(tokens, **flags):
        found = in_bytes(memory_per_gpu(small(), **WORK | {"response_tokens": tokens} | flags)["rollout"])
        return found["kv cache"], found["activations"], found["logits"]

    # 2 x 6 tokens of 32 bytes; 2 images of 16 patches x 3 x 2 x 14 x 14 float32 = 75,264 bytes, and 16 x (400 + 32) in a tower's layer
    assert rollout(10) == (12 * 32, 2 * (75_264 + 6_912), 0)
    assert rollout(10, share_prompt=False) == (24 * 32, 4 * (75_264 + 6_912), 0)
    # Responses of 10,000. All keys and values, one of the prompts' two layers, one token in a layer, six rows of logits and one.
    inner = 128 + 2 * (40 + 32 + 64 + 10_006)  # bytes of a token; it may see 10,006
    assert rollout(10_000) == (4 * 10_006 * 32 + 2 * 6 * 16, 4 * (inner + 32), 25 * 128)
    assert rollout(10_000, bf16=False)[0] == 2 * rollout(10_000)[0] and rollout(10_000, top_p=0.9)[2] == 45 * 128
    # Repeated prompts: a layer of the whole cache is copied when it grows, and images are kept.
    assert rollout(10_000, share_prompt=False)[:2] == (4 * 10_006 * (32 + 16), 4 * (inner + 32 + 75_264))


def test_no_more_responses_than_are_generated_at_once():
    for limit, prompts, responses in ((7, 3, 6), (4, 2, 4), (3, 1, 2), (1, 1, 1)):  # groups of two: three, two, one, half of one
        sizes = memory_per_gpu(small(), **WORK | dict(responses_at_once=limit, response_tokens=10_000))
        assert in_bytes(sizes["rollout"])["kv cache"] == responses * 10_006 * 32 + prompts * 6 * 16


@pytest.mark.parametrize("bf16, share_prompt", [(True, True), (False, True), (True, False)])
def test_a_rollout_holds_what_is_estimated(bf16, share_prompt, tmp_path):
    """All bytes alive at once in a rollout of two calls, weights aside; with short prompts, and with long ones and short responses."""
    build("qwen2_5_vl", tmp_path, num_hidden_layers=12, num_key_value_heads=2, vocab_size=2000)
    policy = Policy(*load(str(tmp_path)), dtype="bfloat16" if bf16 else "float32", share_prompt=share_prompt)
    policy.forbidden = sorted({*policy.forbidden, *policy.eos_ids})  # no response ends before its limit
    for words, tokens, limit in ((3, 16, 1.25), (200, 3, 1.25 if share_prompt else 1.5)):
        example = Example([Image.new("RGB", (56, 28))], "what is the digit ?" + " now" * words, "1")  # two image tokens
        prompts = [encode(policy.processor, example)] * 4
        peak = peak_memory(lambda: generate(policy, prompts, 4, tokens, responses_at_once=8))
        work = dict(image_tokens=2, text_tokens=prompts[0]["input_ids"].shape[1] - 2, response_tokens=tokens, group_size=4, responses_at_once=8)
        found = in_bytes(memory_per_gpu(policy.model.config, bf16=bf16, share_prompt=share_prompt, **work)["rollout"])
        assert 1 <= (found["total"] - found["parameters"] - found["adam"]) / peak < limit


def test_scoring_never_holds_more_than_a_chunk_of_logits():
    config, work = qwen(**MODELS["7B"])
    few, many = (memory_per_gpu(config, **work | dict(tokens_per_batch=n))["score"]["logits"] for n in (4096, 65536))
    assert few == many and 0.99 * 8 * 2**26 < many * GIB <= 8 * 2**26  # 8 tensors of at most 2^24 float32


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("share_prompt", [True, False])
def test_scoring_and_updates_hold_what_is_estimated(share_prompt, checkpointing, rank, chunks, monkeypatch):
    """All bytes alive at once beside the weights, of a model with 12 layers and a vocabulary so large that logits and the head count.

    The update has two pieces, so the second one's gradients come beside those of the first. The optimizer keeps no states.
    """
    if rank:
        pytest.importorskip("peft")
    policy = bench.build(hidden_size=128, intermediate_size=352, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2,
                         layer_types=["full_attention"] * 12, vocab_size=20_000)  # fmt: skip
    model, policy.share_prompt = policy.model, share_prompt
    if rank:
        add_adapter(model, "", rank)
    if checkpointing:
        model.activation_checkpointing_enable()
    (example,) = bench.questions(1, image_tokens=64)
    prompt, T, G = encode(policy.processor, example), 24, 4
    if chunks > 1:  # of the head in an update
        for module in (dryrun, model_module):
            monkeypatch.setattr(module, "CHUNK", 20_000 * -(-10 * (G if share_prompt else 1) // chunks))  # 10 of 24 tokens have a gradient
    L = prompt["input_ids"].shape[1]
    cfg = Config(prompts_per_step=2, group_size=G, max_new_tokens=T, tokens_per_batch=L + G * T, max_grad_norm=1e9, activation_checkpointing=checkpointing)
    batch = Batch(generate(policy, [prompt] * 2, G, T), [example] * 2, [0, 1], torch.tensor([1.0, 0, 0, 0] * 2))
    peaks = {"score": peak_memory(lambda: measure(policy, batch, cfg))}
    modulate(batch, cfg)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    peaks["update"] = peak_memory(lambda: update(policy, optimizer, batch, range(2), cfg))
    work = dict(image_tokens=64, text_tokens=L - 64, response_tokens=T, group_size=G, tokens_per_batch=cfg.tokens_per_batch)
    found = at(model.config, bf16=False, share_prompt=share_prompt, activation_checkpointing=checkpointing, lora_rank=rank, **work)
    for phase, peak in peaks.items():
        sizes = in_bytes(found[phase])
        # A tower without gradient is counted with what a backward pass would keep. Where little else is alive, that is a third too much.
        limit = 1.4 if phase == "update" and rank and checkpointing and not share_prompt else 1.25
        assert 1 <= (sizes["total"] - sizes["parameters"] - sizes["adam"]) / peak < limit


def test_activations_by_hand():
    # 16x8 + 2 (5x8 + 4x8 + 4x16 + 16 tokens of context) = 432; float32: 16x8 + 4 (2x8 + 4x8 + 4x16 + 16) = 640
    assert (layer_bytes(8, 8, 16, 16, True), layer_bytes(8, 8, 16, 16, False)) == (432, 640)
    # a tower's layer has no mask: 400 a patch, 4 patches an image token: 16 patches, 6400
    # an image of 16 patches x 3 x 2 x 14 x 14 float32 pixels: 75,264 bytes, in each pass
    def update(images=1, **flags):
        return in_bytes(at(small(), **WORK | flags)["update"])["activations"] - images * 75_264

    # shared: 6 + 20 tokens, 2 layers; one image; the prompt's keys and values, 2 layers x 2 responses x 6 tokens x 2 x 8 x 2
    assert update() == 26 * 2 * 432 + 6400 + 768
    # repeated: of 26 tokens in a piece one response uses 16, of 32 two use all, with two images
    assert update(share_prompt=False) == 16 * 2 * 432 + 6400
    assert update(images=2, share_prompt=False, tokens_per_batch=32) == 32 * 2 * 432 + 2 * 6400
    # checkpointed: layer inputs are 4 x 8 = 32 bytes a token and a patch; repeated: 32 tokens, two images of 16 patches
    assert update(activation_checkpointing=True, share_prompt=False) == 16 * (2 * 32 + 432) + 16 * 32 + 6400
    # packed: 26 tokens that may see 26. The mask is made once, 2 bytes for each pair, so a layer has 432 - 2 x 16 bytes a token.
    sharded = at(small(), 2, True, **WORK)["update"]
    assert in_bytes(sharded)["activations"] - 75_264 == 26 * (2 * 400 + 2 * 26) + 6400
    assert update(activation_checkpointing=True) == 26 * (2 * 32 + 400 + 2 * 26) + 16 * 32 + 6400
    # Scoring keeps one layer: 26 x (432 + 32), and the prompt's keys and values once for each of 2 responses, 2 x 6 x 2 x 8 x 2.
    assert in_bytes(at(small(), **WORK)["score"])["activations"] - 75_264 == 12_064 + 384


@pytest.mark.parametrize("path, per_token", [("cache", 1), ("plain", 0)])
def test_micro_batches_are_those_of_the_rollout(path, per_token):
    prompts = [{"input_ids": torch.zeros(1, 6)}] * 10
    rollout = Rollout(prompts, torch.zeros(20, 10), torch.ones(20, 10), [""] * 20, torch.zeros(20))
    for tokens in (1, 16, 25, 26, 31, 32, 51, 52, 80):  # one response up to 25, one group of two from 26 on, two groups from 52 on; plain: 16 each
        largest = max(len(rows) for _, rows in rollout.micro_batches(tokens, path=path))
        update = at(small(), **WORK | dict(tokens_per_batch=tokens, k=1.0, share_prompt=path == "cache"))["update"]
        assert in_bytes(update)["logits"] == 4 * largest * 10 * 128, tokens


@pytest.mark.parametrize("flags", [{}, {"activation_checkpointing": True}, {"share_prompt": False}, {"lora_rank": 2}], ids=str)
@pytest.mark.parametrize("tokens_per_batch", [40, 97, 200, 333])
def test_no_lengths_take_more_than_is_estimated(tokens_per_batch, flags):
    """All prompts of 1 to 20 tokens and responses of 1 to 30. At some settings the longest ones do not take the most."""
    work = dict(image_tokens=20, text_tokens=0, response_tokens=30, group_size=3, responses_at_once=6, tokens_per_batch=tokens_per_batch, **flags)
    config, counted = small(hidden=32, heads=4), {}
    counted["weights"], counted["trained"] = count_parameters(config), count_trained(config, flags.get("lora_rank", 0))
    bound = memory_per_gpu(config, **work, **counted)
    taken = [
        memory_at(config, **work | dict(image_tokens=prompt, response_tokens=response), **counted)
        for prompt in range(1, 21) for response in range(1, 31)
    ]  # fmt: skip
    for phase in ("rollout", "score", "update"):
        assert max(sizes[phase]["total"] for sizes in taken) > 0.9 * bound[phase]["total"]
        assert max(sizes[phase]["total"] for sizes in taken) <= bound[phase]["total"] * (1 + 1e-9)


def test_shorter_prompts_or_responses_may_take_more_than_the_longest():
    config, work = qwen(**MODELS["7B"])
    longest = at(config, 8, True, **work)["update"]["total"]
    assert memory_per_gpu(config, 8, True, **work)["update"]["total"] > 1.1 * longest


@pytest.mark.parametrize("name", "image_tokens text_tokens response_tokens tokens_per_batch responses_at_once k".split())
def test_more_tokens_never_take_less(name):
    values = (0.1, 0.4, 1.0) if name == "k" else (8, 64, 512)
    work = WORK | dict(tokens_per_batch=1)  # always one response, so that the cut does not change
    peaks = [memory_per_gpu(small(), **work | {name: value}) for value in values]
    totals = [sum(sizes[phase]["total"] for phase in ("rollout", "score", "update")) for sizes in peaks]
    assert totals[0] < totals[1] < totals[2]
    assert peaks[0]["peak"] <= peaks[1]["peak"] <= peaks[2]["peak"]


@pytest.mark.parametrize("rank", [0, 5, 21])
@pytest.mark.parametrize("bf16", [False, True])
def test_formula_is_what_autograd_keeps(bf16, rank):
    """Bytes kept for the backward pass by a model of two layers less those of one, divided by tokens."""
    if rank:
        pytest.importorskip("peft")
    hidden, heads, intermediate, B, T = 64, 8, 176, 3, 40

    def kept(layers):
        dtype = torch.bfloat16 if bf16 and rank else torch.float32
        model = AutoModelForImageTextToText.from_config(small(layers, hidden, heads, intermediate), dtype=dtype).train()
        if rank:
            add_adapter(model, "", rank)
        shapes = [p.shape for p in model.parameters()]
        weights = {*shapes, *(shape[::-1] for shape in shapes)}  # the second: autocast's copies, transposed
        storages = {}

        def pack(tensor):
            if tensor.shape not in weights:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage  # held, so that no address comes twice
            return tensor

        ids, mask = torch.ones(B, T, dtype=torch.long), torch.ones(B, T, dtype=torch.long)
        mask[0, :3] = 0  # without padding there would be no mask
        cast = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
        with cast, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return sum(storage.nbytes() for storage in storages.values())

    measured = (kept(3) - kept(2)) / (B * T)
    # The formula leaves out a number a norm and a head, float32.
    assert measured == pytest.approx(layer_bytes(hidden, hidden, intermediate, T, bf16, rank) + 4 * (2 + heads), rel=0.002)


# ---------------------------------------------------------------------------------------------------------------------
# Other families, and the table
# ---------------------------------------------------------------------------------------------------------------------
def test_another_family():
    dims = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    text, vision = dict(dims, model_type="llama", vocab_size=32), dict(dims, model_type="clip_vision_model")
    config = LlavaConfig(text_config=text, vision_config=vision)
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModelForImageTextToText.from_config(config).parameters())
    assert in_bytes(memory_per_gpu(config, **WORK)["update"])["parameters"] == 4 * weights


def test_table(capsys):
    dryrun.main()
    header, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 6 + 6 + 8 + 1
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == header.count("|") - 1 and cells[-1] == "computed"
        assert cells[-2] == ("yes" if float(cells[-3]) <= 74.5 else "no")
        assert float(cells[-3]) == max(map(float, cells[4:8]))
    page = Path(dryrun.__file__).parent / "docs" / "cluster.md"
    shown = [line for line in page.read_text().splitlines() if line.endswith("| computed |")]
    assert shown == rows
