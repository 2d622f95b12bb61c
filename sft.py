"""Stage 2: clone expert answers. Cold start for a small model, and the SFT baseline row of the paper's tables.

    python sft.py                                              # SmolLM2-135M, runs/evolve/train.jsonl
    torchrun --standalone --nproc-per-node 8 sft.py --preset paper --model Qwen/Qwen2.5-1.5B-Instruct --records FILE
    python sft.py --resume                                     # go on after a kill: bit for bit the same weights on CPU

Cross-entropy on the expert's tokens and the end-of-turn token, never on the prompt (the released code trains on the
prompt as well). The epoch with the lowest validation loss is kept in RUN/model.
"""

import math
import random
import sys
from dataclasses import dataclass
from typing import Literal

import torch

import model as m
from rewards import InputError, read_records


@dataclass
class Config:
    model: str = m.DEFAULT_MODEL  # hub name, local folder, or smollm2-135m
    records: str = "runs/evolve/train.jsonl"  # records with an `expert` answer; data/teacher.jsonl without evolve.py
    out: str = "runs/sft"  # run folder
    family: Literal["cold", "warm"] = "cold"  # answer format: think and answer tags, or think tags alone (R1 style)
    max_examples: int = 0  # train on the first N examples only; 0 = all
    epochs: int = 1  # passes over the training split
    batch_size: int = 8  # sequences an update, over all processes
    lr: float = 1e-4  # peak learning rate
    warmup: float = 0.05  # share of all updates with linear warm-up; then cosine
    lr_floor: float = 0.0  # learning rate at the end, as a share of the peak
    val_share: float = 0.1  # share of the examples held out to choose the epoch
    max_length: int = 1024  # longer sequences are left out, and counted
    micro_tokens: int = 1024  # tokens a micro-batch, padding included
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # arithmetic; master weights are float32
    shard: bool = False  # FSDP2: weights, gradients and optimizer split over all processes
    offload: Literal["none", "all"] = "none"  # with --shard: keep weights, gradients and optimizer in host memory
    activation_checkpointing: bool = False  # compute activations again in the backward pass: less memory, slower
    save_every: int = 25  # updates between checkpoints
    keep: int = 1  # checkpoints kept; the best epoch is in RUN/model
    seed: int = 0  # of the split and the order
    resume: bool = False  # continue from RUN/checkpoint


PRESETS = {
    # The whole way in minutes, on the few short rows of evolve.py --preset lesson.
    "lesson": dict(records="runs/lesson/evolve/train.jsonl", out="runs/lesson/sft", epochs=4, batch_size=4, lr=2e-4),
    # Full fine-tuning on the 13K experts: 10 epochs, 1e-5 cosine, 16 a device (8 devices), cutoff 16,384 tokens.
    "paper": dict(epochs=10, lr=1e-5, warmup=0.01, batch_size=128, max_length=16384, micro_tokens=16384),
}


def load_examples(cfg: Config, tokenizer):
    """(train, validation) lists of (token ids, response start); the split depends on the seed and the file."""
    path = m.records_path(cfg.records, Config.records, "teacher")
    records = [record for record in read_records(path) if record.get("expert")]
    if not records:
        raise InputError(f"{path}: no record has the field 'expert'; nothing to clone: run python evolve.py, or give "
                         "--records a file with expert answers")
    records = records[: cfg.max_examples or None]
    examples = [m.encode_expert(tokenizer, record, cfg.family) for record in records]
    kept = [example for example in examples if len(example.ids) <= cfg.max_length]
    if len(kept) < len(examples):
        print(f"{len(examples) - len(kept)} of {len(examples)} examples exceed {cfg.max_length} tokens: left out",
              file=sys.stderr)
    random.Random(cfg.seed).shuffle(kept)
    n_val = min(max(1, round(cfg.val_share * len(kept))), len(kept) - 1)
    if n_val < 1:
        raise InputError(f"{path}: {len(kept)} usable example(s); at least 2 are needed to train and validate")
    return kept[n_val:], kept[:n_val]


FILLER = [[m.Sequence([0, 0], 1)]]  # a micro-batch for ranks that have none left


def loss_sum(policy, packs, dtype) -> torch.Tensor:
    """Summed negative log-likelihood of the response tokens of a micro-batch."""
    logp_BR, _ = m.row_logprobs(policy, packs, dtype)  # 0 beyond each row's end
    return -logp_BR.sum()


@torch.no_grad()
def validate(policy, rows, cfg: Config, dtype, rank: int, world: int) -> float:
    """Mean loss a token over the validation split; ranks share the work."""
    own = rows[rank::world]
    total = 0.0
    for packs, weight in m.equal_counts(m.micro_batches(own, cfg.micro_tokens), FILLER):
        total += weight * loss_sum(policy, packs, dtype).item()
    return m.sum_over_ranks(total) / sum(len(ids) - start for ids, start in rows)


def cross_entropy_backward(policy, batch: list[m.Sequence], tokens: int, cfg: Config, dtype) -> float:
    """Accumulate the gradient of the mean loss over `tokens` response tokens; returns this rank's share of it."""
    total = 0.0
    for packs, weight in m.equal_counts(m.micro_batches(batch, cfg.micro_tokens), FILLER):
        loss = weight * loss_sum(policy, packs, dtype) / tokens
        loss.backward()
        total += loss.item()
    return total


def main(argv=None):
    cfg = m.parse_flags(Config, argv, presets=PRESETS)
    rank, world = m.init_distributed()
    m.keep_freed_memory()
    policy, tokenizer = m.load_model(cfg.model)
    train, val = load_examples(cfg, tokenizer)
    dtype = m.compute_dtype(cfg.precision)
    updates_per_epoch = -(-len(train) // cfg.batch_size)
    total_updates = cfg.epochs * updates_per_epoch
    run = m.Run(cfg, total_updates, "update")
    if m.is_main():
        print(m.training_plan(policy, dtype=dtype, shard=cfg.shard, offload=cfg.offload,
                              checkpointing=cfg.activation_checkpointing, micro_tokens=cfg.micro_tokens),
              file=sys.stderr)
    if cfg.activation_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.shard:
        m.shard_model(policy, dtype, offload=cfg.offload == "all")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    done = run.restore(policy, optimizer, {"step": 0, "best": math.inf})

    policy.train()
    for step in range(done["step"], total_updates):
        # 1. The batch of this update, over all ranks, and this rank's share of it.
        epoch, position = divmod(step, updates_per_epoch)
        order = random.Random(f"{cfg.seed}/{epoch}").sample(range(len(train)), len(train))
        batch = [train[i] for i in order[position * cfg.batch_size : (position + 1) * cfg.batch_size]]
        tokens = sum(len(ids) - start for ids, start in batch)  # the normalizer of this update
        own = batch[rank::world]

        # 2. Update: cross-entropy on the expert's tokens.
        with run.clock("update"):
            m.set_lr(optimizer, cfg.lr * m.warmup_cosine(step, total_updates, cfg.warmup, cfg.lr_floor))
            loss = cross_entropy_backward(policy, own, tokens, cfg, dtype)
            gradients = {"cloning": m.take_gradients(policy)}
            norms = m.optimizer_step(policy, optimizer, gradients, step, own, run.folder)

        # 3. Books: a line of metrics; after an epoch the validation loss, which chooses the model that is kept.
        metrics = {"step": step + 1, "epoch": epoch + 1, "loss/train": m.sum_over_ranks(loss), "loss/tokens": tokens,
                   "loss/grad_norm": norms["grad_norm"], "loss/lr": optimizer.param_groups[0]["lr"]}
        epoch_ends = position + 1 == updates_per_epoch
        if epoch_ends:
            with run.clock("validation"):
                metrics["loss/val"] = validate(policy, val, cfg, dtype, rank, world)
            metrics["kept"] = metrics["loss/val"] < done["best"]
            if metrics["kept"]:
                m.write_model(policy, tokenizer, run.folder / "model")
            done["best"] = min(done["best"], metrics["loss/val"])
            run.say(f"epoch {epoch + 1}: train loss {metrics['loss/train']:.3f}, validation loss "
                    f"{metrics['loss/val']:.4f}" + (" (best so far: kept)" if metrics["kept"] else ""))
        run.log(metrics)
        run.bar.set_postfix_str(f"loss {metrics['loss/train']:.3f}")
        done["step"] = step + 1
        run.save_or_stop(policy, optimizer, done, epoch_ends or (step + 1) % cfg.save_every == 0)
    run.bar.close()
    if m.is_main():
        print(f"best validation loss {done['best']:.4f}; model in {run.folder / 'model'}", file=sys.stderr)


if __name__ == "__main__":
    m.launch(main)
