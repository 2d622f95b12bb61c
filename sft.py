"""Stage 2: clone expert answers. Cold start for a small model, and the SFT baseline row of the paper's tables.

    python sft.py                                              # SmolLM2-135M, runs/evolve/train.jsonl
    torchrun --standalone --nproc-per-node 8 sft.py --preset paper --model Qwen/Qwen2.5-1.5B-Instruct --records FILE
    python sft.py --resume                                     # continue a run: bit for bit the same weights on CPU

Cross-entropy on the expert's tokens and the end-of-turn token, never on the prompt (the released code trains on the
prompt as well). The epoch with the lowest validation loss is kept in RUN/model.
"""

import math
import random
from dataclasses import dataclass
from typing import Literal

import torch

import model as m
from rewards import InputError


@dataclass
class Config:
    # the run
    model: str = m.DEFAULT_MODEL  # hub name, local folder, or smollm2-135m
    records: str = "runs/evolve/train.jsonl"  # records with an `expert` answer; data/teacher.jsonl without evolve.py
    out: str = "runs/sft"  # run folder
    epochs: int = 1  # passes over the training split
    batch_size: int = 8  # sequences per update, over all processes
    lr: float = 1e-4  # peak learning rate
    seed: int = 0  # of the split and the order
    resume: bool = False  # continue the run in --out with its own settings
    force: bool = False  # with --resume: take a changed setting even if it changes the course of the run
    # data
    family: Literal["cold", "warm"] = "cold"  # answer format: think and answer tags, or think tags alone (R1 style)
    max_examples: int = 0  # train on the first N examples only; 0 = all
    val_share: float = 0.1  # share of the examples held out to choose the epoch
    max_length: int = 1024  # longer sequences are left out, and counted
    # schedule
    warmup: float = 0.05  # share of all updates with linear warm-up; then cosine
    lr_floor: float = 0.0  # learning rate at the end, as a share of the peak
    # logging and checkpoints
    save_every: int = 25  # updates between checkpoints
    keep: int = 1  # checkpoints kept; the best epoch is in RUN/model
    log: str = ""  # trackers besides metrics.jsonl: tensorboard, wandb, or both with a comma
    # machine
    micro_tokens: int = 1024  # tokens per micro-batch, padding included
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # arithmetic; master weights are float32
    shard: bool = False  # FSDP2: weights, gradients and optimizer split over all processes
    offload: Literal["none", "all"] = "none"  # with --shard: keep weights, gradients and optimizer in host memory
    activation_checkpointing: bool = False  # compute activations again in the backward pass: less memory, slower


PRESETS = {
    # The whole way in minutes, on the few short rows of evolve.py --preset lesson.
    "lesson": dict(records="runs/lesson/evolve/train.jsonl", out="runs/lesson/sft", epochs=4, batch_size=4, lr=2e-4),
    # Full fine-tuning on the 13K experts: 10 epochs, 1e-5 cosine, 16 a device (8 devices), cutoff 16,384 tokens.
    "paper": dict(epochs=10, lr=1e-5, warmup=0.01, batch_size=128, max_length=16384, micro_tokens=16384),
}


def load_examples(cfg: Config, tokenizer) -> tuple[list[m.Sequence], list[m.Sequence]]:
    """(train, validation); the split depends on the seed and the file."""
    path = m.records_path(cfg.records, Config.records, "teacher")
    examples = m.load_experts(path, tokenizer, cfg.family, cfg.max_length, cfg.max_examples)
    if len(examples) < 2:
        raise InputError(f"{path}: {len(examples)} usable record(s) with the field 'expert'; at least 2 are needed to "
                         "train and validate: run python evolve.py, or give --records a file with expert answers")
    random.Random(cfg.seed).shuffle(examples)
    n_val = min(max(1, round(cfg.val_share * len(examples))), len(examples) - 1)
    return examples[n_val:], examples[:n_val]


def loss_sum(policy, packs, dtype) -> torch.Tensor:
    """Summed negative log-likelihood of the response tokens of a micro-batch."""
    logp_BR, _ = m.row_logprobs(policy, packs, dtype)  # 0 beyond each row's end
    return -logp_BR.sum()


@torch.no_grad()
def validate(policy, val: list[m.Sequence], cfg: Config, dtype) -> float:
    """Mean loss per token over the validation split; ranks share the work."""
    rank, world = m.init_distributed()
    total = 0.0
    for packs, weight in m.rank_micro_batches(val[rank::world], cfg.micro_tokens):
        total += weight * loss_sum(policy, packs, dtype).item()
    return m.sum_over_ranks(total) / sum(len(sequence.ids) - sequence.start for sequence in val)


def cross_entropy_backward(policy, batch: list[m.Sequence], tokens: int, cfg: Config, dtype) -> float:
    """Accumulate the gradient of the mean loss over `tokens` response tokens; returns this rank's share of it."""
    total = 0.0
    for packs, weight in m.rank_micro_batches(batch, cfg.micro_tokens):
        loss = weight * loss_sum(policy, packs, dtype) / tokens
        loss.backward()
        total += loss.item()
    return total


def main(argv=None):
    cfg = m.parse_flags(Config, argv, presets=PRESETS)
    rank, world = m.init_distributed()
    m.keep_freed_memory()
    policy, tokenizer = m.load_model(cfg.model)
    (train, val), dtype = load_examples(cfg, tokenizer), m.compute_dtype(cfg.precision)
    updates_per_epoch = -(-len(train) // cfg.batch_size)
    total_updates = cfg.epochs * updates_per_epoch
    run = m.Run(cfg, total_updates, "update")
    m.print_plan(policy, cfg, dtype)
    m.prepare(policy, cfg, dtype)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    run.restore(policy, optimizer)

    for step in range(run.step, total_updates):
        # 1. The batch of this update, over all ranks.
        epoch, position = divmod(step, updates_per_epoch)
        order = random.Random(f"{cfg.seed}/{epoch}").sample(range(len(train)), len(train))
        batch = [train[i] for i in order[position * cfg.batch_size : (position + 1) * cfg.batch_size]]
        tokens = sum(len(sequence.ids) - sequence.start for sequence in batch)  # the normalizer of this update

        # 2. Update: cross-entropy on the expert's tokens, each rank on its share of the batch.
        with run.clock("update"):
            policy.train()
            own = batch[rank::world]
            m.set_lr(optimizer, cfg.lr * m.warmup_cosine(step, total_updates, cfg.warmup, cfg.lr_floor))
            loss = cross_entropy_backward(policy, own, tokens, cfg, dtype)
            gradients = {"bc": m.take_gradients(policy)}
            norms = m.optimizer_step(policy, optimizer, gradients, step, own, run.folder)
            policy.eval()

        # 3. Log: a line of metrics; after an epoch the validation loss, which chooses the model that is kept.
        metrics = {"step": step + 1, "epoch": epoch + 1, "loss/train": m.sum_over_ranks(loss), "loss/tokens": tokens,
                   "loss/grad_norm": norms.get("grad_norm"), "loss/nonfinite": norms.get("nonfinite", 0),
                   "loss/lr": optimizer.param_groups[0]["lr"]}
        epoch_ends = position + 1 == updates_per_epoch
        if epoch_ends:
            with run.clock("validation"):
                metrics["loss/val"] = validate(policy, val, cfg, dtype)
            earlier = [row["loss/val"] for row in run.history if "loss/val" in row]
            best = min(filter(math.isfinite, earlier), default=math.inf)
            metrics["kept"] = metrics["loss/val"] < best
            if metrics["kept"]:
                m.write_model(policy, tokenizer, run.folder / "model")
        run.log(metrics)
        run.bar.set_postfix_str(f"loss {metrics['loss/train']:.3f}")
        if epoch_ends:
            run.say("epoch {epoch}: train loss {loss/train:.3f}, validation loss {loss/val:.4f}, best so far: {kept}"
                    .format_map(run.history[-1]))
        run.save_or_stop(policy, optimizer, epoch_ends or (step + 1) % cfg.save_every == 0)
    run.say(f"the model of the epoch with the lowest validation loss is in {run.folder / 'model'}")


if __name__ == "__main__":
    m.launch(main)
