"""Side by side with TRL's GRPOTrainer: rollout, update and whole step, on the same prompts, lengths and precision.

    pip install trl==1.16.0
    python tests/bench/bench_trl.py                  interleaved: after each of TRL's steps one of ours
    python tests/bench/bench_trl.py --mixed          responses of 24 to 96 tokens instead of 96 each
    python tests/bench/bench_trl.py --only ours      (or trl) alone, for the peak memory of the process
    python tests/bench/bench_trl.py --only trl --plain    TRL as it comes: both sides above have our memory settings

SmolLM2-135M, float32 weights, bf16 arithmetic where the processor has it, KL 0.001 with a reference pass, one update,
4 prompts × 8 responses, micro-batches of 8 rows (ours: 1024 tokens). Before the first step both compute the gradient of
TRL's own first batch; their cosine is printed. The first step of each is warm-up and not counted.
"""

import argparse
import copy
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import grpo  # noqa: E402
import model as m  # noqa: E402

P, G, T = 4, 8, 96


def lengths(mixed: bool) -> list[int]:
    return [24 + 8 * (i % 10) for i in range(P * G)] if mixed else [T] * (P * G)


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


class Ours:
    """The step of grpo.py without scoring and cloning, at fixed response lengths."""

    def __init__(self, model, tokenizer, prompts, mixed):
        self.policy, self.reference = model, copy.deepcopy(model).requires_grad_(False)
        self.dtype, self.prompts, self.mixed = m.compute_dtype("auto"), prompts, mixed
        self.engine = m.make_engine("hf", model, tokenizer, dtype=self.dtype)
        self.engine.eos_ids = [-1]  # every response has its full length
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        self.times = []

    def step(self):
        began = time.perf_counter()
        self.engine.sync(self.policy)
        groups = self.engine.generate(self.prompts, n=G, max_tokens=T, seeds=range(P))
        middle = time.perf_counter()
        wanted = iter(lengths(self.mixed))
        rows = [m.Sequence(prompt + c.token_ids[: next(wanted)], len(prompt), (-1.0) ** i)
                for prompt, group in zip(self.prompts, groups, strict=True) for i, c in enumerate(group)]
        grpo.policy_backward(self.policy, self.reference, grpo.Update(rows, len(rows), 0), grpo.Config(), self.dtype)
        m.optimizer_step(self.policy, self.optimizer, {"policy": m.take_gradients(self.policy)}, 0, [], Path("."))
        self.times.append((middle - began, time.perf_counter() - middle))


def trl_trainer(model, tokenizer, texts, mixed, on_step, steps, folder):
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            trainer.rollout_s, trainer.began = 0.0, time.perf_counter()

        def on_pre_optimizer_step(self, *args, **kwargs):
            if trainer.first_gradient is None:
                trainer.first_gradient = flat_gradient(model)

        def on_step_end(self, *args, **kwargs):
            step_s = time.perf_counter() - trainer.began
            trainer.times.append((trainer.rollout_s, step_s - trainer.rollout_s))
            on_step()

    settings = GRPOConfig(
        folder, per_device_train_batch_size=8, gradient_accumulation_steps=P * G // 8, num_generations=G,
        max_completion_length=T, generation_kwargs={"min_new_tokens": T}, beta=0.001, loss_type="grpo", max_steps=steps,
        learning_rate=1e-6, use_cpu=True, bf16=m.compute_dtype("auto") == torch.bfloat16, shuffle_dataset=False,
        use_bias_correction_kl=False,  # TRL's default multiplies the KL by the ratio
        report_to=[], save_strategy="no", logging_steps=1000, gradient_checkpointing=False, disable_tqdm=True)
    trainer = GRPOTrainer(model, lambda completions, **_: [float(i % 2) for i in range(len(completions))], settings,
                          Dataset.from_list([{"prompt": text} for text in texts] * steps), processing_class=tokenizer,
                          callbacks=[Clock()])
    trainer.first_gradient, trainer.first_batch, trainer.times, trainer.rollout_s = None, [], [], 0.0
    generate, prepare = trainer._generate_single_turn, trainer._generate_and_score_completions

    def timed(*args, **kwargs):
        began = time.perf_counter()
        result = generate(*args, **kwargs)
        trainer.rollout_s += time.perf_counter() - began
        return result

    def shortened(inputs):
        batch = prepare(inputs)
        if mixed:
            batch["completion_mask"] = batch["completion_mask"] * (
                torch.arange(T) < torch.tensor(lengths(True))[:, None])
        if not trainer.first_batch:
            trainer.first_batch.append({k: v.clone() for k, v in batch.items() if torch.is_tensor(v)})
        return batch

    trainer._generate_single_turn, trainer._generate_and_score_completions = timed, shortened
    return trainer


def our_gradient(model, batch):
    """Ours on the batch that TRL trained on first: the same tokens, masks and advantages."""
    rows = []
    for b in range(len(batch["advantages"])):
        prompt = batch["prompt_ids"][b][batch["prompt_mask"][b].bool()].tolist()
        response = batch["completion_ids"][b][batch["completion_mask"][b].bool()].tolist()
        rows.append(m.Sequence(prompt + response, len(prompt), batch["advantages"][b].item()))
    grpo.policy_backward(model, model, grpo.Update(rows, len(rows), 0), grpo.Config(), m.compute_dtype("auto"))
    gradient = flat_gradient(model)
    model.zero_grad(set_to_none=True)
    return gradient


def summary(times, tokens):
    rollout_s, update_s = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return {"rollout_s": round(rollout_s, 1), "update_s": round(update_s, 1), "step_s": round(rollout_s + update_s, 1),
            "rollout_tokens_per_s": round(P * G * T / rollout_s), "update_tokens_per_s": round(tokens / update_s)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--mixed", action="store_true")
    parser.add_argument("--only", choices=["ours", "trl"])
    parser.add_argument("--plain", action="store_true", help="without our settings of glibc and oneDNN")
    parser.add_argument("--out", default="runs/bench-trl")
    args = parser.parse_args()
    if not args.plain:
        m.keep_freed_memory()
    model, tokenizer = m.load_model("smollm2-135m")
    texts = [f"Write a short note about {topic} for a friend who has never heard of it, and be kind and brief in it."
             for topic in ("green tea", "a small garden", "night trains", "old radios")]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    tokens = sum(lengths(args.mixed)) + G * sum(map(len, prompts))  # every row's prompt counted, as TRL computes it
    report, start = {}, copy.deepcopy(model)
    ours = Ours(copy.deepcopy(model), tokenizer, prompts, args.mixed) if args.only != "trl" else None
    if args.only == "ours":
        for _ in range(args.steps):
            ours.step()
    else:
        trainer = trl_trainer(model, tokenizer, texts, args.mixed, ours.step if ours else lambda: None, args.steps,
                              args.out)
        trainer.train()
        report["trl"] = summary(trainer.times, tokens)
        if ours:
            gradient = our_gradient(start, trainer.first_batch[0])
            report["cosine of first gradient"] = torch.cosine_similarity(
                gradient.double(), trainer.first_gradient.double(), dim=0).item()
    if ours:
        report["ours"] = summary(ours.times, tokens)
    if len(report) == 3:
        report["times faster"] = {key: round(report["trl"][key] / report["ours"][key], 2)
                                  for key in ("rollout_s", "update_s", "step_s")}
    report["peak GiB of the process"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
