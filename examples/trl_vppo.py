"""VPPO in somebody else's trainer: trl's GRPOTrainer with one method overridden; all of VPPO's arithmetic is imported.

    pip install trl==1.16.0 datasets==5.2.0 && python examples/trl_vppo.py     20 steps of the tiny model on the digits task

For your own trainer, copy loss.py and dependency.py (torch, numpy and pillow are all they need) and do what VPPOTrainer does
where it holds a graded rollout batch: S (Eq. 3), token mask (Eq. 4), alpha (Eq. 5), A' = alpha * A. Nothing else changes.

How this becomes Eq. 6, and the settings that matter (see `digits_trainer`):
* Advantages of shape (B, T), which GRPOTrainer accepts: a token with advantage 0 has no gradient and still counts in every
  divisor, as it must. A token mask in completion_mask or tool_mask would make "grpo" and "bnpo" divide by kept tokens alone.
* loss_type="dapo": sum over tokens / response tokens of the rollout batch, our average="token". With one update per rollout
  batch (trl's default) that is our divisor exactly. With U updates (steps_per_generation = U * gradient_accumulation_steps)
  trl divides each by 1/U of the batch's tokens, we by the update's own. Our "sequence" (Eq. 6 as printed): loss_type="grpo".
* scale_rewards="none": trl hands out R - mean(R), which our group_advantages divides by std + 1e-6 (trl: std + 1e-4).

Left as trl does it: no dynamic sampling (groups without a signal count in divisor and TAS); several updates share out
responses, not whole groups; image placeholders are not sampled, but scored; a prompt is run G times. Eq. 3 needs whole
distributions and trl keeps none: two passes without gradient are added, on the true and on the masked image. For Qwen-VL
models, one process or several with DDP; FSDP's or ZeRO-3's sharded weights would have to be gathered for `states`.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # where loss.py and dependency.py are

try:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid
except ImportError:
    sys.exit("examples/trl_vppo.py needs: pip install trl==1.16.0 datasets==5.2.0")

from dependency import mask_images, score_tokens
from loss import group_advantages, masked_mean, shaping_factors, token_filter


class VPPOTrainer(GRPOTrainer):
    """GRPOTrainer whose advantages are VPPO's, (B, T): alpha_i * A_i on the tokens that Eq. 4 keeps, 0 on the others."""

    k, beta_min, beta_max, mask = 0.4, 0.9, None, "blacken"  # Table 9; None: dynamic, mean alpha = 1

    def _generate_and_score_completions(self, inputs):
        """Once per rollout batch, before trl cuts it into micro-batches: here TAS sees all trajectories. inputs: B rows."""
        batch = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return batch  # an evaluation looks at rewards only
        response_mask = batch["completion_mask"].bool()  # (B, T) right padded, True on real tokens, the end token included
        S = self.dependency(batch, inputs)  # (B, T)
        # Over the trajectories of all ranks: Eq. 5 says so, and trl may split a group of Eq. 1 between two ranks.
        alpha = shaping_factors(self.accelerator.gather(masked_mean(S, response_mask)), self.beta_min, self.beta_max)
        centred = self.accelerator.gather(batch["advantages"])  # R - mean(R)
        shaped = alpha * group_advantages(centred, self.num_generations)  # A' = alpha * A, negative ones too
        shaped = shaped.split(len(S))[self.accelerator.process_index]  # this rank's (B,)
        batch["advantages"] = shaped[:, None] * token_filter(S, response_mask, self.k)  # (B, T)
        return batch

    @torch.no_grad()
    def dependency(self, batch, inputs):
        """S of Eq. 3, (B, T), exact: over the whole vocabulary, by the rollout policy. 0 on padding."""
        # One masked image per prompt, the same for its G responses: drawn by a key, the prompt's place in the run.
        rows = range(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        start = self.state.global_step * self.args.generation_batch_size // self.num_generations
        keys = [[self.args.seed, start + row // self.num_generations, 0] for row in rows]
        hidden = [image for x, key in zip(inputs, keys) for image in mask_images(x["images"], self.mask, key)]
        pixels = self.processing_class.image_processor(images=hidden, return_tensors="pt")["pixel_values"]
        masked = batch | {"pixel_values": pixels.to(batch["pixel_values"].device)}  # same sizes, so the rest stays as it is
        head = self.accelerator.unwrap_model(self.model).get_output_embeddings()
        # In pieces of per_device_train_batch_size; a Qwen's pixels are flat over patches, which trl's own tools can cut.
        cut = [split_tensor_dict(split_pixel_values_by_grid(x), self.args.steps_per_generation) for x in (batch, masked)]
        S = []
        for true, blind in zip(*cut):
            mask, ids = true["completion_mask"].bool(), true["completion_ids"]
            states, masked_states = self.states(true)[mask], self.states(blind)[mask]  # (N, H): padding dropped
            scores = score_tokens(lambda h: head(h).float() / self.temperature, states, masked_states, ids[mask])
            S.append(torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, scores["dependency"]))
        return torch.cat(S)

    def states(self, piece):
        """The states that predict the response, (B, T, H): the last prompt token's to the last response token's but one."""
        piece = unsplit_pixel_values_by_grid(piece)
        words = {key: piece[key] for key in ("pixel_values", "image_grid_thw", "mm_token_type_ids")}
        words["input_ids"] = torch.cat([piece["prompt_ids"], piece["completion_ids"]], dim=1)
        words["attention_mask"] = torch.cat([piece["prompt_mask"], piece["completion_mask"]], dim=1)
        body = self.accelerator.unwrap_model(self.model).base_model
        with self.accelerator.autocast():
            return body(**words, use_cache=False)[0][:, -piece["completion_ids"].shape[1] - 1 : -1]


def digits_trainer(folder, prompts, group_size, **words):
    """A VPPOTrainer for the tiny model in `folder` on the digits task. words: further fields of GRPOConfig."""
    from laptop.digits import Digits
    from model import load, placeholder_ids
    from reward import grade

    def correct(completions, answer, **_):
        """Reward: 1 if the last \\boxed{} holds the answer. trl calls it once per rollout batch."""
        rewards = [grade(completion[0]["content"], truth) for completion, truth in zip(completions, answer)]
        print(f"reward {sum(rewards) / len(rewards):.3f}", flush=True)
        return rewards

    model, processor = load(folder)
    task = map(Digits("train").__getitem__, range(256))
    rows = [{"prompt": [{"role": "user", "content": x.problem}], "images": x.images, "answer": x.answer} for x in task]
    vppo = dict(loss_type="dapo", scale_rewards="none", epsilon=0.2, epsilon_high=0.28, beta=0.0, weight_decay=0.01)
    forbidden = {"suppress_tokens": placeholder_ids(model, processor)}  # trl forbids one placeholder by itself, not all
    sampling = dict(num_generations=group_size, max_completion_length=48, top_p=1.0, top_k=0, generation_kwargs=forbidden)
    sizes = dict(per_device_train_batch_size=prompts * group_size // 2, gradient_accumulation_steps=2)
    laptop = dict(output_dir="runs/trl", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True)
    args = GRPOConfig(report_to=[], save_strategy="no", logging_strategy="no", **vppo | sampling | sizes | laptop | words)
    return VPPOTrainer(model, correct, args, train_dataset=Dataset.from_list(rows), processing_class=processor)


if __name__ == "__main__":
    from laptop import tiny

    digits_trainer(tiny.ensure()[0], prompts=16, group_size=8, max_steps=20, learning_rate=3e-4).train()
