"""Stage 3: GRPO with the superior-CoT rule and the behaviour-cloning term (RAIF, arXiv 2506.01413, section 3).

    python grpo.py                                             # SmolLM2-135M from runs/sft/model, about 20 minutes
    torchrun --standalone --nproc-per-node 2 grpo.py           # the same gradient from two processes
    torchrun --nproc-per-node 4 grpo.py --preset paper-1.5b --records FILE
    python grpo.py --resume                                    # go on after a kill: bit for bit the same weights on CPU
    python grpo.py --show runs/grpo --step 3 [--id rl-0012]    # one step's rollouts in the terminal, group by group

The way of one prompt: record -> prompt ids -> G reasoning + H direct rollouts -> scores -> rewards_PG, keep_P,
advantages_PG -> micro-batches -> logp, old, ref -> loss + BC -> optimizer step -> log line and samples file.
What is not in here, because the paper's objective does not have it: an entropy bonus, a critic, discounting
(γ = 1), KL inside the reward, more than one inner epoch.
"""

import argparse
import math
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import model as m
from rewards import InputError, count_slips, parse_response, read_records, score


@dataclass
class Config:
    model: str = "runs/sft/model"  # initial policy and reference policy; the paper's rows start from an instruct model
    records: str = "runs/evolve/rl.jsonl"  # prompts of the rollouts; data/rl.jsonl if evolve.py never ran
    experts: str = ""  # records with expert answers to clone (default: train.jsonl next to --records, else --records)
    data: Literal["mixed", "complex", "math"] = "mixed"  # which of its records: both at math_ratio, or one kind alone
    out: str = "runs/grpo"  # run folder
    family: Literal["cold", "warm"] = "cold"  # answer format: think and answer tags, or think tags alone (R1 style)
    dev: str = ""  # prompts never trained on, for a curve (default: dev.jsonl next to --records, if it is there)
    dev_prompts: int = 32  # so many of them are answered greedily at the start and at every save; 0 = no curve
    judge: str = ""  # answers judge questions: NAME (loaded here) or NAME@URL; the paper's: Qwen/Qwen2.5-7B-Instruct
    # the objective: the paper's values
    clip_eps: float = 0.2  # ε of the clipped surrogate
    kl_coef: float = 0.001  # weight of the k3 KL to the initial policy; 0 = no reference model
    bc_coef: float = 1.0  # λ of the behaviour-cloning term (Eq. 8); 0 = off
    superior_cot: bool = True  # skip prompts on which every reasoning rollout is worse than every direct one (Eq. 7)
    math_ratio: float = 0.1  # math prompts per instruction prompt (the paper's main runs: 1)
    # variants; the defaults are the paper's
    loss: Literal["grpo", "dapo", "dr_grpo"] = "grpo"  # weight of a token: 1/its row, 1/all tokens, 1/the length limit
    clip_high: float = 0.0  # ε above 1 (DAPO's clip-higher); 0 = clip_eps
    advantage: Literal["group_norm", "mean_only", "none"] = "group_norm"  # (R − mean) / std, R − mean, or R itself
    reward: Literal["raif", "fraction", "all", "rules_x_judge"] = "raif"  # accuracy part: see rewards.VARIANTS
    drop_zero_variance: bool = False  # leave groups of equal rewards out of the update: no KL from them, other counts
    code_only: bool = False  # leave out judge constraints, and records that have no others
    # the scale: a laptop's values
    steps: int = 10  # rollout batches
    prompts: int = 4  # P, prompts a rollout batch, over all processes
    group: int = 6  # G, reasoning rollouts a prompt (math prompts get group + direct of them)
    direct: int = 2  # H, no-reasoning rollouts an instruction prompt
    updates: int = 1  # optimizer steps a rollout batch; the first is exactly on-policy
    bc_batch: int = 8  # expert answers an update; the paper has one per reasoning rollout
    max_new_tokens: int = 200  # response limit
    max_prompt_tokens: int = 1024  # longer prompts are left out, and counted
    temperature: float = 1.0  # sampling temperature; top-p and top-k stay off
    lr: float = 3e-5  # peak learning rate
    warmup: float = 0.03  # share of lr_horizon with linear warm-up
    lr_horizon: int = 0  # optimizer steps until the cosine reaches a tenth of the peak; 0 = twice the run
    micro_tokens: int = 1024  # tokens a micro-batch, padding included
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # arithmetic; master weights are float32
    engine: Literal["hf", "vllm"] = "hf"  # rollout engine; vllm: CUDA only, under torchrun
    engine_share: float = 0.4  # part of the GPU memory that vllm may take
    shard: bool = False  # FSDP2: weights, gradients and optimizer split over all processes
    offload: Literal["none", "reference", "all"] = "none"  # with --shard: keep reference, or all, in host memory
    activation_checkpointing: bool = False  # compute activations again in the backward pass: less memory, slower
    save_every: int = 10  # steps between checkpoints
    keep: int = 1  # checkpoints kept; the model with the best rewards since the save before is kept in RUN/best
    seed: int = 0  # of data order and sampling
    resume: bool = False  # continue from RUN/checkpoint


# 26K prompts = 812 rollout batches an episode; the cosine's 30-episode horizon (2 updates each) is never reached.
_PAPER = dict(steps=2000, prompts=32, updates=2, bc_batch=128, max_new_tokens=4096, lr=1e-6, lr_horizon=48_720,
              math_ratio=1.0, micro_tokens=16_384, activation_checkpointing=True, save_every=50)
PRESETS = {
    # The whole way in minutes, after the other stages' lesson presets.
    "lesson": dict(model="runs/lesson/sft/model", records="runs/lesson/evolve/rl.jsonl", out="runs/lesson/grpo",
                   steps=4, prompts=2, group=4, bc_batch=4, max_new_tokens=120, math_ratio=0.0, save_every=2,
                   dev_prompts=8),
    "paper-1.5b": dict(model="Qwen/Qwen2.5-1.5B-Instruct", **_PAPER),
    "paper-7b": dict(model="Qwen/Qwen2.5-7B-Instruct", shard=True, **_PAPER),
}


# ---------------------------------------------------------------- the objective


def group_advantages(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Group-normalised advantages, (P, G): A_i = (R_i − mean_G) / std_G with the unbiased std.

    A group of equal rewards, or of one rollout, says nothing about which rollout is better: exact zeros.
    """
    if rewards_PG.shape[1] < 2:
        return torch.zeros_like(rewards_PG)
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    advantages_PG = centred_PG / (rewards_PG.std(1, keepdim=True) + 1e-8)
    flat_P = rewards_PG.amax(1, keepdim=True) == rewards_PG.amin(1, keepdim=True)
    return torch.where(flat_P, torch.zeros_like(advantages_PG), advantages_PG)


def superior_cot_mask(reasoning_PG: torch.Tensor, direct_PH: torch.Tensor) -> torch.Tensor:
    """Paper Eq. 7, (P,) bool: True = train on the prompt. Takes accuracy rewards alone, without the format part.

    A prompt is skipped when its best reasoning rollout is worse than its worst direct one: thinking as it is now would
    only be reinforced for being the least bad. Without direct rollouts (math, H = 0) nothing is skipped.
    """
    if direct_PH.shape[1] == 0:
        return torch.ones(len(reasoning_PG), dtype=torch.bool, device=reasoning_PG.device)
    return reasoning_PG.amax(1) >= direct_PH.amin(1)


def grpo_loss(logp_BT, old_logp_BT, ref_logp_BT, advantages_B, mask_BT, *, clip_eps=0.2, kl_coef=0.001,
              normalizer=None, clip_high=None, row_length=None):
    """Clipped surrogate + k3 KL: the sum over rows of each row's token mean, divided by `normalizer` (None = B).

    mask_BT: True on response tokens. The trainer passes the row count of the whole optimizer step over all ranks, so
    that micro-batches and ranks add up to the same gradient. A row with an empty mask contributes 0. ref_logp_BT may
    be None when kl_coef is 0. -> (loss, stats); the stats are normalised like the loss and add up like it.
    Variants: clip_high, another ε above 1; row_length, what every row's token sum is divided by instead of its length.
    """
    mask_BT = mask_BT.bool()
    normalizer = len(logp_BT) if normalizer is None else normalizer
    # Masked before anything is exponentiated: exp of garbage is inf, and inf · 0 is NaN in the backward pass.
    log_ratio_BT = torch.where(mask_BT, logp_BT - old_logp_BT.detach(), 0.0)
    advantages_B1 = advantages_B[:, None]

    length_B = row_length or mask_BT.sum(1).clamp(min=1)

    def row_mean_sum(values_BT):
        return (torch.where(mask_BT, values_BT, 0.0).sum(1) / length_B).sum() / normalizer

    # L_policy = −mean_i mean_t min(ρ A, clip(ρ, 1−ε, 1+ε) A), ρ = π_θ / π_old
    ratio_BT = log_ratio_BT.exp()
    clipped_BT = ratio_BT.clamp(1 - clip_eps, 1 + (clip_high or clip_eps))
    policy_loss = row_mean_sum(-torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1))

    # L_KL = mean_i mean_t (exp(−Δ) − 1 + Δ), Δ = log π_θ − log π_ref  (k3: unbiased, never negative)
    kl = torch.zeros_like(policy_loss)
    if kl_coef:
        delta_BT = torch.where(mask_BT, logp_BT - ref_logp_BT.detach(), 0.0)
        kl = row_mean_sum(torch.exp(-delta_BT) - 1 + delta_BT)

    binding_BT = (ratio_BT - clipped_BT) * advantages_B1 > 0  # the clip holds back this token's gradient
    stats = {"policy_loss": policy_loss.item(), "kl": kl.item(), "clip_share": row_mean_sum(binding_BT.float()).item()}
    return policy_loss + kl_coef * kl, stats


@dataclass
class Row:
    """One response to train on."""

    ids: list[int]  # prompt and response
    start: int  # index of the first response token
    advantage: float = 0.0
    old_logp: torch.Tensor | None = None  # (R,) under the policy that sampled it, by the trainer's own arithmetic
    sampled_logp: list[float] | None = None  # the same by the engine's: only compared

    def __iter__(self):  # packs of rows are packs of (token ids, response start)
        return iter((self.ids, self.start))


def filler() -> list[list[Row]]:
    """A micro-batch of weight 0, for a rank that has none left (new each time: rows keep log-probabilities)."""
    return [[Row([0, 0], 1)]]


def policy_backward(policy, reference, rows: list[Row], normalizer: int, cfg: Config, dtype) -> dict:
    """Accumulate the gradient of L_policy + kl_coef · L_KL over these rows; returns the summed stats."""
    totals = Counter()
    for packs, weight in m.equal_counts(m.micro_batches(rows, cfg.micro_tokens), filler()):
        batch, ref_logp_BR = [row for pack in packs for row in pack], None
        if reference is not None:
            with torch.no_grad():
                ref_logp_BR, _ = m.row_logprobs(reference, packs, dtype, cfg.temperature)
        logp_BR, mask_BR = m.row_logprobs(policy, packs, dtype, cfg.temperature)
        if batch[0].old_logp is None:  # the first update of a rollout batch is exactly on-policy
            keep_logprobs(batch, logp_BR, mask_BR)
        old_logp_BR = torch.zeros_like(logp_BR)
        old_logp_BR[mask_BR] = torch.cat([row.old_logp for row in batch])
        advantages_B = torch.tensor([row.advantage for row in batch], dtype=logp_BR.dtype, device=logp_BR.device)
        loss, stats = grpo_loss(logp_BR, old_logp_BR, ref_logp_BR, advantages_B, mask_BR, clip_eps=cfg.clip_eps,
                                kl_coef=cfg.kl_coef, normalizer=normalizer, clip_high=cfg.clip_high,
                                row_length={"grpo": None, "dapo": 1, "dr_grpo": cfg.max_new_tokens}[cfg.loss])
        (weight * loss).backward()
        lengths = [m.pack_length(pack) for pack in packs]
        stats |= {"tokens": sum(lengths), "slots": len(lengths) * max(lengths)}
        totals.update({name: weight * value for name, value in stats.items()})
    return totals


def cloning_backward(policy, rows: list[Row], normalizer: int, cfg: Config, dtype) -> float:
    """Accumulate the gradient of λ · mean_i mean_t −log π_θ(ỹ|x̃) (Eq. 8) over expert rows; returns the BC loss."""
    total = 0.0
    for packs, weight in m.equal_counts(m.micro_batches(rows, cfg.micro_tokens), filler()):
        logp_BR, mask_BR = m.row_logprobs(policy, packs, dtype)
        loss = -weight * (logp_BR.sum(1) / mask_BR.sum(1)).sum() / normalizer
        (cfg.bc_coef * loss).backward()
        total += loss.item()
    return total


@torch.no_grad()
def store_old_logprobs(policy, rows: list[Row], cfg: Config, dtype) -> None:
    """Fill in old_logp: the sampling policy's log-probabilities, needed once the policy moves on."""
    for packs, _ in m.equal_counts(m.micro_batches(rows, cfg.micro_tokens), filler()):
        keep_logprobs([row for pack in packs for row in pack], *m.row_logprobs(policy, packs, dtype, cfg.temperature))


def keep_logprobs(batch: list[Row], logp_BR, mask_BR) -> None:
    for row, logp_R, mask_R in zip(batch, logp_BR.detach(), mask_BR, strict=True):
        row.old_logp = logp_R[mask_R]


def engine_mismatch(rows: list[Row]) -> dict:
    """|Δ|, its maximum and KL(engine ‖ trainer) in nats a token, over all ranks; Δ = trainer − engine log-probability.

    They differ by arithmetic alone (kernels, bf16); growing figures mean that the engine runs on other weights.
    """
    gaps = [row.old_logp.float().cpu() - torch.tensor(row.sampled_logp) for row in rows if row.old_logp is not None]
    gap_N = torch.cat(gaps or [torch.zeros(0)])
    parts = m.gather_objects([(gap_N.abs().sum().item(), gap_N.abs().max().item() if len(gap_N) else 0.0,
                               (gap_N.exp() - 1 - gap_N).sum().item(), len(gap_N))])
    total, most, kl, count = zip(*parts, strict=True)
    return {"engine_gap": round(sum(total) / max(1, sum(count)), 5), "engine_gap_max": round(max(most), 4),
            "engine_kl": round(sum(kl) / max(1, sum(count)), 6)}


# ---------------------------------------------------------------- data


def within_limit(records: list[dict], tokenizer, cfg: Config) -> list[dict]:
    """The records whose prompt fits --max-prompt-tokens; the others are counted on stderr."""
    fitting = []
    for record in records:
        prompt = m.render_prompt(tokenizer, record["messages"], "cot", cfg.family, record.get("language", "en"))
        if len(prompt.ids) <= cfg.max_prompt_tokens:
            fitting.append(record)
    if len(fitting) < len(records):
        print(f"{len(records) - len(fitting)} of {len(records)} prompts exceed {cfg.max_prompt_tokens} tokens: "
              "left out", file=sys.stderr)
    return fitting


def load_pools(cfg: Config, tokenizer) -> dict[str, list[dict]]:
    """{"instruction", "math", "expert"}: record lists, prompts over the limit left out and counted.

    Rollouts start from --records. Cloned are the answers of --experts: on a laptop other requests, so that rollouts
    are about what SFT has not seen; in the paper the same ones.
    """
    path = m.records_path(cfg.records, Config.records, "rl")
    if cfg.experts:
        expert_path = Path(cfg.experts)
    else:
        beside = m.data_dir / "teacher.jsonl" if path.parent == m.data_dir else path.with_name("train.jsonl")
        expert_path = beside if beside.exists() else path
    fitting = within_limit(read_records(path), tokenizer, cfg)
    if cfg.code_only:
        stripped = [code_only(record) for record in fitting]
        fitting = [record for record in stripped if record["task"] == "math" or record["constraints"]]
        print(f"--code-only: {len(stripped) - len(fitting)} of {len(stripped)} records have no active code constraint: "
              "left out", file=sys.stderr)
    limit = cfg.max_prompt_tokens + cfg.max_new_tokens
    experts = [record for record in within_limit(read_records(expert_path), tokenizer, cfg) if record.get("expert")]
    short = [record for record in experts if len(m.encode_expert(tokenizer, record, cfg.family).ids) <= limit]
    if len(short) < len(experts):
        print(f"{len(experts) - len(short)} of {len(experts)} experts exceed {limit} tokens: not cloned",
              file=sys.stderr)
    pools = {
        "instruction": [record for record in fitting if record["task"] == "instruction" and cfg.data != "math"],
        "math": [record for record in fitting if record["task"] == "math" and cfg.data != "complex"],
        "expert": short,  # cloned whatever --data says
    }
    if not pools["instruction"] and cfg.data != "math":
        raise InputError(f"{path}: no instruction record within {cfg.max_prompt_tokens} prompt tokens; run "
                         "python evolve.py or raise --max-prompt-tokens")
    judged = [record["id"] for record in pools["instruction"]
              if any(c["kind"] == "judge" and c["active"] for c in record["constraints"])]
    if judged and not cfg.judge:
        raise InputError(f"{path}: record {judged[0]!r} ({len(judged)} such) has a judge constraint; "
                         "give --judge NAME (loaded here) or NAME@URL (served), or --code-only to leave it out")
    if not pools["math"] and (cfg.data == "math" or cfg.data == "mixed" and cfg.math_ratio > 0):
        raise InputError(f"{path}: --data {cfg.data}, --math-ratio {cfg.math_ratio} but no record has task 'math'; add "
                         "math records (python evolve.py does) or give --math-ratio 0")
    if cfg.bc_coef > 0 and not pools["expert"]:
        raise InputError(f"{expert_path}: --bc-coef {cfg.bc_coef} but no record has the field 'expert'; give --experts "
                         "a file with expert answers (python evolve.py writes train.jsonl) or --bc-coef 0")
    return pools


def load_dev(cfg: Config) -> list[dict]:
    """--dev-prompts development records at even distances; none where there is no file, and none that need a judge."""
    records_file = m.records_path(cfg.records, Config.records, "rl")
    path = Path(cfg.dev) if cfg.dev else records_file.with_name("dev.jsonl")
    if not cfg.dev_prompts or not (cfg.dev or path.exists()):
        return []
    usable = [record for record in map(code_only, read_records(path))
              if record["task"] == "instruction" and record["constraints"]]
    count = min(cfg.dev_prompts, len(usable))
    return [usable[i * len(usable) // count] for i in range(count)]


def code_only(record: dict) -> dict:
    """The record without its judge constraints; `depends_on` counts anew, and through a judged one to what it needs."""
    if record["task"] == "math":
        return record
    kept, number, needs = [], {}, []
    for i, c in enumerate(record["constraints"]):
        needs.append({k for j in c["depends_on"] for k in ([j] if j in number else needs[j])})
        if c["kind"] == "code":
            number[i] = len(kept)
            kept.append({**c, "depends_on": sorted(number[j] for j in needs[i])})
    return {**record, "constraints": kept if any(c["active"] for c in kept) else []}


def draw(pool: list[dict], name: str, start: int, count: int, seed: int) -> list[dict]:
    """Items start … start + count of an endless stream that passes through the pool in a new order each time."""
    if count == 0:
        return []
    orders = {turn: random.Random(f"{seed}/{name}/{turn}").sample(range(len(pool)), len(pool))
              for turn in range(start // len(pool), (start + count - 1) // len(pool) + 1)}
    return [pool[orders[i // len(pool)][i % len(pool)]] for i in range(start, start + count)]


def prompts_of_step(pools, step: int, cfg: Config) -> list[dict]:
    """The P records of a step, a function of (seed, step): resuming needs no cursor. Math comes at its ratio."""
    math_share = {"mixed": cfg.math_ratio / (1 + cfg.math_ratio), "complex": 0.0, "math": 1.0}[cfg.data]
    math_before, math_after = (math.floor(s * cfg.prompts * math_share + 1e-9) for s in (step, step + 1))
    n_math = math_after - math_before
    records = draw(pools["instruction"], "instruction", step * cfg.prompts - math_before,
                   cfg.prompts - n_math, cfg.seed) + draw(pools["math"], "math", math_before, n_math, cfg.seed)
    # A record twice in a step (small pools only) would roll out the same twice: once is enough.
    return list({record["id"]: record for record in records}.values())


# ---------------------------------------------------------------- rollouts and rewards


def rollout(engine, tokenizer, records: list[dict], step: int, cfg: Config) -> list[dict]:
    """Reasoning and direct rollouts of these records: one dict a rollout, those of a record side by side."""
    wanted = []  # (record, mode, number of rollouts)
    for record in records:
        if record["task"] == "math":
            wanted.append((record, "cot", cfg.group + cfg.direct))
        else:
            wanted += [(record, "cot", cfg.group), (record, "direct", cfg.direct)]
    wanted = [item for item in wanted if item[2]]
    prompts = [m.render_prompt(tokenizer, record["messages"], mode, cfg.family, record.get("language", "en"))
               for record, mode, _ in wanted]
    groups = engine.generate(
        [prompt.ids for prompt in prompts], n=[count for _, _, count in wanted], max_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature, stop=(),
        seeds=[m.record_seed(cfg.seed, step, f"{record['id']}/{mode}") for record, mode, _ in wanted],
    )
    return [
        {"id": record["id"], "task": record["task"], "mode": mode, "prompt_ids": prompt.ids,
         "token_ids": completion.token_ids, "text": prompt.prefill + completion.text,
         "finish_reason": completion.finish_reason, "logprobs": completion.logprobs, "record": record}
        for (record, mode, _), prompt, group in zip(wanted, prompts, groups, strict=True)
        for completion in group
    ]


def score_samples(samples: list[dict], judge, cfg: Config) -> None:
    """Add `format`, `accuracy`, `reward` (their sum) and `verdicts`; direct ones are scored by their answer alone."""
    for direct in (False, True):
        part = [sample for sample in samples if (sample["mode"] == "direct") == direct]
        scores = score([s["record"] for s in part], [s["text"] for s in part], judge=judge, family=cfg.family,
                       direct=direct, variant=cfg.reward, truncated=[s["finish_reason"] == "length" for s in part])
        for sample, result in zip(part, scores, strict=True):
            sample.update(format=result.format, accuracy=result.accuracy, reward=result.total,
                          verdicts=result.verdicts, guards=result.guards)


def assign_advantages(samples: list[dict], cfg: Config) -> None:
    """Add `advantage`, `kept` and, where it is not kept, `why` to the samples of each group.

    Groups are taken one by one: math groups have another size than instructions.
    """
    groups: dict[str, list[dict]] = {}
    for sample in samples:
        groups.setdefault(sample["id"], []).append(sample)
    for group in groups.values():
        reasoning = [s for s in group if s["mode"] == "cot"]
        direct = [s for s in group if s["mode"] == "direct"]
        rewards_PG = torch.tensor([[s["reward"] for s in reasoning]], dtype=torch.float64)
        accuracy_PG = torch.tensor([[s["accuracy"] for s in reasoning]], dtype=torch.float64)
        direct_PH = torch.tensor([[s["accuracy"] for s in direct]], dtype=torch.float64)
        # The mean and std are those of the reasoning rollouts alone (the released code mixes the direct ones in).
        advantages_PG = {"group_norm": group_advantages(rewards_PG), "none": rewards_PG,
                         "mean_only": rewards_PG - rewards_PG.mean(1, keepdim=True)}[cfg.advantage]
        keep_P = superior_cot_mask(accuracy_PG, direct_PH) if cfg.superior_cot else torch.ones(1, dtype=torch.bool)
        why = "" if keep_P[0] else "worse than direct"
        if cfg.drop_zero_variance and not why and bool((rewards_PG == rewards_PG[0, 0]).all()):
            why = "zero variance"
        for sample, advantage in zip(reasoning, advantages_PG[0].tolist(), strict=True):
            sample.update(advantage=advantage, kept=not why, why=why)
        for sample in direct:  # they judge the reasoning; they are not trained on
            sample.update(advantage=None, kept=False, why="direct")


def rollout_metrics(samples: list[dict]) -> dict:
    """Reward parts, rates and lengths of a step, over all ranks' samples."""

    def mean(values):
        values = list(values)
        return round(sum(values) / len(values), 4) if values else None

    reasoning = [s for s in samples if s["mode"] == "cot"]
    instructions = [s for s in reasoning if s["task"] == "instruction"]
    direct = [s for s in samples if s["mode"] == "direct"]
    groups: dict[str, list[dict]] = {}
    for s in reasoning:
        groups.setdefault(s["id"], []).append(s)
    return {
        "reward": mean(s["reward"] for s in reasoning),
        "reward_format": mean(s["format"] for s in reasoning),
        "reward_accuracy": mean(s["accuracy"] for s in reasoning),
        "all_met": mean(all(s["verdicts"]) for s in instructions),
        "direct_all_met": mean(all(s["verdicts"]) for s in direct),
        "math_correct": mean(s["accuracy"] == 2 for s in reasoning if s["task"] == "math"),
        "format_rate": mean(s["format"] > 0 for s in reasoning),
        "truncated": mean(s["finish_reason"] == "length" for s in reasoning),
        "guards": dict(Counter(name for s in reasoning for name in s["guards"])),
        "skip_rate": mean(g[0]["why"] == "worse than direct" for g in groups.values() if g[0]["task"] == "instruction"),
        "flat_groups": mean(len({s["reward"] for s in g}) == 1 for g in groups.values()),
        "response_tokens": mean(len(s["token_ids"]) for s in reasoning),
        # −log p of a sampled token has the entropy of the sampling distribution as its mean (nats a token).
        "entropy": mean(-logp for s in reasoning for logp in s["logprobs"]),
        "direct_rollouts": len(direct),
    }


def dev_metrics(engine, tokenizer, records: list[dict], cfg: Config) -> dict:
    """Greedy answers to development prompts, the ranks' shares put together: what training has reached so far.

    Slips are single faults, such as each capital in an answer that has to be in lower case, per 100 answer tokens.
    """
    rank, world = m.init_distributed()
    own = records[rank::world]
    prompts = [m.render_prompt(tokenizer, record["messages"], "cot", cfg.family, record.get("language", "en"))
               for record in own]
    groups = engine.generate([prompt.ids for prompt in prompts], n=1, max_tokens=cfg.max_new_tokens, temperature=0.0,
                             seeds=[0] * len(own))
    texts = [prompt.prefill + group[0].text for prompt, group in zip(prompts, groups, strict=True)]
    rows = []
    for record, text, result in zip(own, texts, score(own, texts, family=cfg.family), strict=True):
        answer = parse_response(text, cfg.family).answer
        tokens = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
        rows.append((all(result.verdicts), result.format > 0, count_slips(record, answer), tokens))
    met, well_formed, slips, tokens = (sum(column) for column in zip(*m.gather_objects(rows), strict=True))
    return {"dev_all_met": round(met / len(records), 4), "dev_format_rate": round(well_formed / len(records), 4),
            "dev_slips": round(100 * slips / max(1, tokens), 3)}


# ---------------------------------------------------------------- the run


def readable(sample: dict) -> dict:
    """A rollout as a line of the samples file that can be read alone.

    Prompt, text, each constraint with its verdict, reward parts, advantage, and whether it was trained on, or why not.
    """
    record = sample["record"]
    if record["task"] == "math":
        asked = [f"The result is {record['answer']}."]
    else:
        asked = [c.get("text") or c.get("question") or c["id"] for c in record["constraints"] if c["active"]]
    constraints = [{"text": text, "met": met} for text, met in zip(asked, sample["verdicts"], strict=True)]
    kept = {name: value for name, value in sample.items() if name not in ("record", "prompt_ids", "logprobs")}
    return {"prompt": record["messages"][-1]["content"], **kept, "constraints": constraints}


def show(argv) -> None:
    """--show RUN --step N [--id ID]: the rollouts of a step from the samples file, group by group."""
    parser = argparse.ArgumentParser(description=show.__doc__)
    parser.add_argument("--show", required=True, metavar="RUN")
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--id", default="")
    given = parser.parse_args(argv)
    path = Path(given.show) / "samples" / f"step-{given.step:06d}.jsonl"
    samples = [sample for sample in m.read_jsonl(path) if given.id in ("", sample["id"])]
    if not samples:
        raise InputError(f"{path}: {'no rollout of ' + given.id if path.exists() else 'is not there'}; "
                         f"{given.show}/samples holds a file for each finished step")
    last = ""
    for sample in samples:
        if sample["id"] != last:
            print(f"{'=' * 100}\nstep {given.step}, {sample['id']}: {sample['prompt']}")
        last = sample["id"]
        print(f"{'-' * 100}\n{sample['mode']}: reward {sample['reward']:+.2f} = format {sample['format']:+.0f} and "
              f"accuracy {sample['accuracy']:+.2f}", end="")
        if sample["advantage"] is not None:
            print(f", advantage {sample['advantage']:+.2f}", end="")
        print("; trained on" if sample["kept"] else f"; not trained on: {sample['why']}")
        for constraint in sample["constraints"]:
            print(f"  [{'x' if constraint['met'] else ' '}] {constraint['text']}")
        print(sample["text"])


def main(argv=None):
    if "--show" in (sys.argv if argv is None else argv):
        return show(argv)
    cfg = m.parse_flags(Config, argv, presets=PRESETS)
    if cfg.superior_cot and (cfg.direct == 0 or cfg.data == "math"):
        raise InputError(f"--direct {cfg.direct} --data {cfg.data}: the superior-CoT rule compares with direct rollouts"
                         " of instructions and could never fire; give --direct 2 and other --data, or "
                         "--no-superior-cot")
    if cfg.offload != "none" and not cfg.shard:
        raise InputError(f"--offload {cfg.offload}: works with --shard, under torchrun")
    rank, world = m.init_distributed()
    stop = m.stop_signals()
    m.keep_freed_memory()
    policy, tokenizer = m.load_model(cfg.model)
    pools, dev_records = load_pools(cfg, tokenizer), load_dev(cfg)
    dtype = m.compute_dtype(cfg.precision)
    run = m.open_run(cfg.out, cfg, resume=cfg.resume)
    n_rows = cfg.prompts * (cfg.group + cfg.direct)
    if rank == 0:
        print(m.training_plan(
            policy, dtype=dtype, shard=cfg.shard, offload=cfg.offload, checkpointing=cfg.activation_checkpointing,
            reference=cfg.kl_coef > 0, engine=cfg.engine, engine_share=cfg.engine_share, micro_tokens=cfg.micro_tokens,
            rollout_tokens=n_rows * cfg.max_new_tokens,
            trained_tokens=(n_rows + cfg.bc_batch * cfg.updates) * cfg.max_new_tokens), file=sys.stderr)
    judge = m.make_judge(cfg.judge, precision=cfg.precision, cache=run / "judge_cache")
    engine = m.make_engine(cfg.engine, policy, tokenizer, dtype=dtype, own_copy=cfg.shard, source=cfg.model,
                           max_length=cfg.max_prompt_tokens + cfg.max_new_tokens, share=cfg.engine_share)
    if cfg.activation_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.shard:  # one model after the other: two whole ones might not fit
        m.shard_model(policy, dtype, offload=cfg.offload == "all")
    reference = m.load_model(cfg.model)[0].requires_grad_(False) if cfg.kl_coef else None
    if cfg.shard and reference is not None:
        m.shard_model(reference, dtype, offload=cfg.offload != "none")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    # What a resumed run goes on from, beside weights and optimizer; all else follows from (seed, step).
    done = {"step": 0, "direct_seen": 0, "skipped": 0, "rewards": [], "best": -math.inf}
    if cfg.resume:
        done = m.load_checkpoint(run, policy, optimizer)
    began, first_step = time.time(), done["step"]
    bar = tqdm(total=cfg.steps, initial=first_step, unit="step", disable=rank != 0)
    while done["step"] < cfg.steps:
        # Rollouts: G with reasoning and H direct ones a prompt, this rank's share of the prompts, scored.
        step, clock = done["step"], [time.time()]
        engine.wake()
        engine.sync(policy)
        metrics = {}
        if dev_records and step == 0:
            before = dev_metrics(engine, tokenizer, dev_records, cfg)
            metrics = {f"{name}_before": value for name, value in before.items()}
        samples = rollout(engine, tokenizer, prompts_of_step(pools, step, cfg)[rank::world], step, cfg)
        engine.sleep()
        clock.append(time.time())
        score_samples(samples, judge, cfg)
        assign_advantages(samples, cfg)
        clock.append(time.time())

        # The kept responses of all ranks are shuffled and cut into `updates` parts, the same on every rank.
        rows = {(s["id"], i): Row(s["prompt_ids"] + s["token_ids"], len(s["prompt_ids"]), s["advantage"],
                                  sampled_logp=s["logprobs"])
                for i, s in enumerate(samples) if s["kept"]}
        lengths = dict(m.gather_objects([(key, len(row.ids) - row.start) for key, row in rows.items()]))
        keys = sorted(lengths)
        random.Random(f"{cfg.seed}/shuffle/{step}").shuffle(keys)
        parts = [keys[u * len(keys) // cfg.updates : (u + 1) * len(keys) // cfg.updates] for u in range(cfg.updates)]
        if cfg.updates > 1:  # the first part is on-policy; the others need the sampling policy's log-probabilities
            store_old_logprobs(policy, [rows[key] for part in parts[1:] for key in part if key in rows], cfg, dtype)

        policy.train()
        totals = Counter()
        for update, part in enumerate(parts):
            if not part and not cfg.bc_coef:
                continue  # every prompt skipped: no gradient, on any rank
            number = step * cfg.updates + update
            factor = m.warmup_cosine(number, cfg.lr_horizon or 2 * cfg.steps * cfg.updates, cfg.warmup, 0.1)
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * factor
            own = [rows[key] for key in part if key in rows]
            # Counted over the whole update and all ranks; skipped prompts are in no part and so in no count.
            normalizer = sum(lengths[key] for key in part) if cfg.loss == "dapo" else len(part)
            stats = policy_backward(policy, reference, own, normalizer, cfg, dtype)
            policy_norm, gradient = m.take_gradients(policy)
            parts_of_gradient, bc_norm = [gradient], 0.0
            if cfg.bc_coef:
                m.keep_freed_memory(trim=True)
                experts = draw(pools["expert"], "expert", number * cfg.bc_batch, cfg.bc_batch, cfg.seed)[rank::world]
                cloned = [Row(*m.encode_expert(tokenizer, record, cfg.family)) for record in experts]
                stats["bc_loss"] = cloning_backward(policy, cloned, cfg.bc_batch, cfg, dtype)
                bc_norm, gradient = m.take_gradients(policy)
                parts_of_gradient.append(gradient)
                own = own + cloned
            batch = [{"ids": row.ids, "start": row.start, "advantage": row.advantage} for row in own]
            grad_norm = m.optimizer_step(policy, optimizer, parts_of_gradient, number, batch, run)
            norms = {"grad_norm": grad_norm, "grad_norm_policy": policy_norm, "grad_norm_bc": bc_norm}
            stats |= {name: norm / world for name, norm in norms.items()}  # each is of all ranks: their sum, once
            stats["trained"] = sum(len(row.ids) for row in own)
            totals.update({name: value / cfg.updates for name, value in stats.items()})
        policy.eval()
        clock.append(time.time())

        # One line of metrics a step, and every rollout with its text, verdicts, rewards, advantage and fate.
        done["step"] = step = step + 1
        mismatch = engine_mismatch(list(rows.values()))
        names = ("policy_loss", "kl", "clip_share", "bc_loss", "grad_norm", "grad_norm_policy", "grad_norm_bc",
                 "tokens", "slots", "trained")
        totals = {name: round(m.sum_over_ranks(totals[name]), 6) for name in names}
        all_samples = m.gather_objects(samples)
        metrics = {"step": step, **metrics, **rollout_metrics(all_samples), **totals, **mismatch,
                   "padding": round(1 - totals["tokens"] / max(1, totals["slots"]), 4),
                   "lr": optimizer.param_groups[0]["lr"]}
        regular = step % cfg.save_every == 0 or step == cfg.steps
        if dev_records and regular:
            engine.wake()
            engine.sync(policy)
            metrics |= dev_metrics(engine, tokenizer, dev_records, cfg)
            engine.sleep()
            clock.append(time.time())
        done["direct_seen"] += metrics["direct_rollouts"]
        done["skipped"] += len({s["id"] for s in all_samples if s["why"] == "worse than direct"})
        done["rewards"].append(metrics["reward"])
        if rank == 0:
            sampled = sum(len(s["token_ids"]) for s in all_samples)
            rollout_s, scoring_s, update_s, *_ = (
                after - before for before, after in zip(clock, clock[1:], strict=False))
            metrics.update(rollout_s=round(rollout_s, 2), scoring_s=round(scoring_s, 3), update_s=round(update_s, 2),
                           rollout_tps=round(sampled / rollout_s, 1),
                           update_tps=round(totals["trained"] * cfg.updates / update_s, 1))
            m.append_jsonl(run / "metrics.jsonl", metrics)
            m.write_jsonl(run / "samples" / f"step-{step:06d}.jsonl",
                          [readable(sample) for sample in all_samples])
            eta = (time.time() - began) / (step - first_step) * (cfg.steps - step)
            bar.write(
                f"step {step}/{cfg.steps} reward {metrics['reward']:+.2f} (format {metrics['reward_format']:+.2f}, "
                f"accuracy {metrics['reward_accuracy']:+.2f}) all met {metrics['all_met'] or 0:.2f}, direct "
                f"{metrics['direct_all_met'] or 0:.2f} | format {metrics['format_rate']:.2f} skip "
                f"{metrics['skip_rate'] or 0:.2f} flat {metrics['flat_groups']:.2f} length "
                f"{metrics['response_tokens']:.0f} | kl {totals['kl']:.4f} clip {totals['clip_share']:.3f} bc "
                f"{totals['bc_loss']:.3f} | rollout {rollout_s:.0f} s {metrics['rollout_tps']:.0f} tok/s, "
                f"scoring {scoring_s:.1f} s, update {update_s:.0f} s {metrics['update_tps']:.0f} tok/s | "
                f"ETA {eta / 60:.0f} min")
            if "dev_all_met" in metrics:
                bar.write(f"development prompts, greedy: all met {metrics['dev_all_met']:.2f}, format "
                          f"{metrics['dev_format_rate']:.2f}, {metrics['dev_slips']:.2f} slips per 100 answer tokens")
            recent = [row["flat_groups"] for row in m.read_jsonl(run / "metrics.jsonl")[-10:]]
            if step % 10 == 0 and min(recent) == 1:
                bar.write("warning: in the last ten steps no reward differed within a group: nothing is learned; look "
                          f"at {run / 'samples'}: is every answer right, or every one wrong?")
        bar.update()
        m.keep_freed_memory(trim=True)
        stopping = stop()
        if regular:
            mean_reward = sum(done["rewards"]) / len(done["rewards"])
            if mean_reward > done["best"]:
                m.write_model(policy, tokenizer, run / "best")
            done.update(best=max(done["best"], mean_reward), rewards=[])
        if regular or stopping:
            m.save_checkpoint(run, policy, optimizer, done, keep=cfg.keep)
        if stopping and step < cfg.steps:
            raise KeyboardInterrupt
    bar.close()
    m.write_model(policy, tokenizer, run / "model")
    if rank == 0:
        print(f"superior-CoT rule: {done['direct_seen']} direct rollouts seen, {done['skipped']} prompts skipped; "
              f"model in {run / 'model'}", file=sys.stderr)
        if cfg.superior_cot and done["direct_seen"] == 0:
            raise InputError("the superior-CoT rule never saw a direct rollout: this was not a RAIF run; check that "
                             "--records holds instruction records, or give --no-superior-cot")


if __name__ == "__main__":
    m.launch(main)
