"""Stage 3: GRPO with the superior-CoT rule and the behaviour-cloning term (RAIF, arXiv 2506.01413, section 3).

    python grpo.py                                             # SmolLM2-135M from runs/sft/model
    torchrun --standalone --nproc-per-node 2 grpo.py           # the same gradient from two processes
    torchrun --nproc-per-node 4 grpo.py --preset paper-1.5b --records FILE
    python grpo.py --resume                                    # go on after a kill: bit for bit the same weights on CPU
    python grpo.py --show runs/grpo --step 3 [--id rl-0012]    # one step's rollouts in the terminal, group by group

    python grpo.py --help metrics                              # what each number of metrics.jsonl means, when to worry

The way of one prompt: record -> prompt ids -> G reasoning + H direct rollouts -> scores -> rewards_PG, keep_P,
advantages_PG -> micro-batches -> logp, old, ref -> loss + BC -> optimizer step -> log line and samples file.

What differs from plain GRPO:
1. H direct rollouts a prompt, with an empty thought, are scored but not trained on (superior_cot_mask, Eq. 7): a prompt
   on which every reasoning rollout is worse than every direct one leaves the update and its count.
2. Expert answers are cloned in every update (cloning_backward, Eq. 8).
3. There is no entropy bonus, no critic, no discounting (γ = 1), no KL inside the reward.
What differs from the released code: rewards score the answer, not the label; direct rollouts get their real score, so
the rule can fire; mean and std are those of the reasoning rollouts alone; skipped prompts contribute nothing; cloning
trains on answer tokens alone; a truncated rollout is flagged, its last token is not overwritten.
"""

import argparse
import math
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

import model as m
from rewards import InputError, Score, count_slips, parse_response, read_records, score


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
    steps: int = 6  # rollout batches
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


# ---------------------------------------------------------------- the update


@dataclass
class Rollout:
    """One response, from its birth to its line in the samples file."""

    mode: str  # "cot": with reasoning, trained on; "direct": with an empty thought, compared with
    sequence: m.Sequence  # prompt and response; takes advantage and old log-probabilities through the update
    text: str  # the whole assistant turn, what the prompt has opened included
    finish_reason: str  # "stop" or "length"
    sampled_logp: list[float]  # of each response token by the engine: compared with the trainer's, never trained on
    score: Score | None = None


@dataclass
class Group:
    """The rollouts of one prompt."""

    record: dict
    reasoning: list[Rollout] = field(default_factory=list)  # G
    direct: list[Rollout] = field(default_factory=list)  # H
    why_not: str = ""  # why it is not trained on ("worse than direct", "zero variance"); empty if it is


def filler() -> list[list[m.Sequence]]:
    """A micro-batch of weight 0, for a rank that has none left (new each time: sequences keep log-probabilities)."""
    return [[m.Sequence([0, 0], 1)]]


def policy_backward(policy, reference, sequences: list[m.Sequence], normalizer: int, cfg: Config, dtype) -> Counter:
    """Accumulate the gradient of L_policy + kl_coef · L_KL over these sequences; returns the summed stats."""
    totals = Counter()
    for packs, weight in m.equal_counts(m.micro_batches(sequences, cfg.micro_tokens), filler()):
        batch, ref_logp_BR = [sequence for pack in packs for sequence in pack], None
        if reference is not None:
            with torch.no_grad():
                ref_logp_BR, _ = m.row_logprobs(reference, packs, dtype, cfg.temperature)
        logp_BR, mask_BR = m.row_logprobs(policy, packs, dtype, cfg.temperature)
        if batch[0].old_logp is None:  # the first update of a rollout batch is exactly on-policy
            keep_logprobs(batch, logp_BR, mask_BR)
        old_logp_BR = torch.zeros_like(logp_BR)
        old_logp_BR[mask_BR] = torch.cat([sequence.old_logp for sequence in batch])
        advantages_B = torch.tensor([s.advantage for s in batch], dtype=logp_BR.dtype, device=logp_BR.device)
        loss, stats = grpo_loss(logp_BR, old_logp_BR, ref_logp_BR, advantages_B, mask_BR, clip_eps=cfg.clip_eps,
                                kl_coef=cfg.kl_coef, normalizer=normalizer, clip_high=cfg.clip_high,
                                row_length={"grpo": None, "dapo": 1, "dr_grpo": cfg.max_new_tokens}[cfg.loss])
        (weight * loss).backward()
        lengths = [m.pack_length(pack) for pack in packs]
        stats |= {"tokens": sum(lengths), "slots": len(lengths) * max(lengths)}
        totals.update({name: weight * value for name, value in stats.items()})
    return totals


def cloning_backward(policy, experts: list[m.Sequence], normalizer: int, cfg: Config, dtype) -> float:
    """Accumulate the gradient of λ · mean_i mean_t −log π_θ(ỹ|x̃) (Eq. 8) over expert answers; returns the BC loss."""
    total = 0.0
    for packs, weight in m.equal_counts(m.micro_batches(experts, cfg.micro_tokens), filler()):
        logp_BR, mask_BR = m.row_logprobs(policy, packs, dtype)
        loss = -weight * (logp_BR.sum(1) / mask_BR.sum(1)).sum() / normalizer
        (cfg.bc_coef * loss).backward()
        total += loss.item()
    return total


@torch.no_grad()
def store_old_logprobs(policy, sequences: list[m.Sequence], cfg: Config, dtype) -> None:
    """Fill in old_logp: the sampling policy's log-probabilities, needed once the policy moves on."""
    for packs, _ in m.equal_counts(m.micro_batches(sequences, cfg.micro_tokens), filler()):
        batch = [sequence for pack in packs for sequence in pack]
        keep_logprobs(batch, *m.row_logprobs(policy, packs, dtype, cfg.temperature))


def keep_logprobs(batch: list[m.Sequence], logp_BR, mask_BR) -> None:
    for sequence, logp_R, mask_R in zip(batch, logp_BR.detach(), mask_BR, strict=True):
        sequence.old_logp = logp_R[mask_R]


def split_into_updates(groups: list[Group], step: int, cfg: Config) -> list[tuple[list[m.Sequence], int]]:
    """(this rank's sequences, normalizer) of each update: the kept responses of all ranks, shuffled alike everywhere.

    The normalizer is counted over the whole update and all ranks, so that micro-batches and ranks add up to the same
    gradient; skipped prompts are in no part and so in no count.
    """
    own = {(group.record["id"], i): rollout.sequence
           for group in groups if not group.why_not for i, rollout in enumerate(group.reasoning)}
    lengths = dict(m.gather_objects([(key, len(sequence.ids) - sequence.start) for key, sequence in own.items()]))
    keys = sorted(lengths)
    random.Random(f"{cfg.seed}/shuffle/{step}").shuffle(keys)
    updates = []
    for u in range(cfg.updates):
        part = keys[u * len(keys) // cfg.updates : (u + 1) * len(keys) // cfg.updates]
        normalizer = sum(lengths[key] for key in part) if cfg.loss == "dapo" else len(part)
        updates.append(([own[key] for key in part if key in own], normalizer))
    return updates


def engine_mismatch(groups: list[Group]) -> dict:
    """|Δ|, its maximum and KL(engine ‖ trainer) in nats a token, over all ranks; Δ = trainer − engine log-probability.

    They differ by arithmetic alone (kernels, bf16); growing figures mean that the engine runs on other weights.
    """
    gaps = [rollout.sequence.old_logp.float().cpu() - torch.tensor(rollout.sampled_logp)
            for group in groups for rollout in group.reasoning if rollout.sequence.old_logp is not None]
    gap_N = torch.cat(gaps or [torch.zeros(0)])
    parts = m.gather_objects([(gap_N.abs().sum().item(), gap_N.abs().max().item() if len(gap_N) else 0.0,
                               (gap_N.exp() - 1 - gap_N).sum().item(), len(gap_N))])
    total, most, kl, count = zip(*parts, strict=True)
    return {"rollout/engine_gap": sum(total) / max(1, sum(count)), "rollout/engine_gap_max": max(most),
            "rollout/engine_kl": sum(kl) / max(1, sum(count))}


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


def load_pools(cfg: Config, tokenizer) -> dict[str, list]:
    """{"instruction", "math"}: records to roll out, {"expert"}: sequences to clone; what is too long is counted.

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
    experts = [m.encode_expert(tokenizer, record, cfg.family) for record in experts]
    short = [sequence for sequence in experts if len(sequence.ids) <= limit]
    if len(short) < len(experts):
        print(f"{len(experts) - len(short)} of {len(experts)} experts exceed {limit} tokens: not cloned",
              file=sys.stderr)
    pools = {
        "instruction": [record for record in fitting if record["task"] == "instruction" and cfg.data != "math"],
        "math": [record for record in fitting if record["task"] == "math" and cfg.data != "complex"],
        "expert": short,  # cloned whatever --data says
        "dev": load_dev(cfg),
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


def experts_of_update(pools, number: int, cfg: Config) -> list[m.Sequence]:
    """The expert answers that update `number` clones, over all ranks: other ones in every update."""
    return draw(pools["expert"], "expert", number * cfg.bc_batch, cfg.bc_batch, cfg.seed)


# ---------------------------------------------------------------- rollouts and rewards


def rollout(engine, tokenizer, records: list[dict], step: int, cfg: Config) -> list[Group]:
    """G reasoning and H direct rollouts of each record; math has no direct ones, but G + H with reasoning."""
    wanted = []  # (record, mode, number of rollouts)
    for record in records:
        if record["task"] == "math":
            wanted.append((record, "cot", cfg.group + cfg.direct))
        else:
            wanted += [(record, "cot", cfg.group), (record, "direct", cfg.direct)]
    wanted = [item for item in wanted if item[2]]
    prompts = [m.render_prompt(tokenizer, record["messages"], mode, cfg.family, record.get("language", "en"))
               for record, mode, _ in wanted]
    completions = engine.generate(
        [prompt.ids for prompt in prompts], n=[count for _, _, count in wanted], max_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature, stop=(),
        seeds=[m.record_seed(cfg.seed, step, f"{record['id']}/{mode}") for record, mode, _ in wanted],
    )
    groups = {record["id"]: Group(record) for record in records}
    for (record, mode, _), prompt, several in zip(wanted, prompts, completions, strict=True):
        group = groups[record["id"]]
        for c in several:
            sequence = m.Sequence(prompt.ids + c.token_ids, len(prompt.ids))
            made = Rollout(mode, sequence, prompt.prefill + c.text, c.finish_reason, c.logprobs)
            (group.reasoning if mode == "cot" else group.direct).append(made)
    return list(groups.values())


def score_groups(groups: list[Group], judge, cfg: Config) -> None:
    """Give each rollout its Score; direct ones are scored by their answer alone."""
    for direct in (False, True):
        pairs = [(group.record, made) for group in groups for made in (group.direct if direct else group.reasoning)]
        scores = score([record for record, _ in pairs], [made.text for _, made in pairs], judge=judge,
                       family=cfg.family, direct=direct, variant=cfg.reward,
                       truncated=[made.finish_reason == "length" for _, made in pairs])
        for (_, made), result in zip(pairs, scores, strict=True):
            made.score = result


ADVANTAGES = {
    "group_norm": group_advantages,
    "mean_only": lambda rewards_PG: rewards_PG - rewards_PG.mean(1, keepdim=True),
    "none": lambda rewards_PG: rewards_PG,
}


def assign_advantages(groups: list[Group], cfg: Config) -> None:
    """Give each reasoning rollout its advantage, and each group that is left out of the update the reason."""
    for task in ("instruction", "math"):  # their groups have different sizes: G + H, and G + H + 0
        part = [group for group in groups if group.record["task"] == task]
        if not part:
            continue
        # Mean and std are those of the reasoning rollouts alone (the released code mixes the direct ones in).
        rewards_PG = torch.tensor([[r.score.total for r in g.reasoning] for g in part], dtype=torch.float64)
        accuracy_PG = torch.tensor([[r.score.accuracy for r in g.reasoning] for g in part], dtype=torch.float64)
        direct_PH = torch.tensor([[r.score.accuracy for r in g.direct] for g in part], dtype=torch.float64)
        advantages_PG = ADVANTAGES[cfg.advantage](rewards_PG)
        keep_P = superior_cot_mask(accuracy_PG, direct_PH)
        flat_P = rewards_PG.amax(1) == rewards_PG.amin(1)
        for p, group in enumerate(part):
            if cfg.superior_cot and not keep_P[p]:
                group.why_not = "worse than direct"
            elif cfg.drop_zero_variance and flat_P[p]:
                group.why_not = "zero variance"
            for made, advantage in zip(group.reasoning, advantages_PG[p].tolist(), strict=True):
                made.sequence.advantage = advantage


# ---------------------------------------------------------------- books


def sample_lines(group: Group) -> list[dict]:
    """The group's rollouts as lines of the samples file, each of which can be read alone.

    Prompt, text, each constraint with its verdict, reward parts, advantage, and whether it was trained on, or why not.
    """
    record, lines = group.record, []
    if record["task"] == "math":
        asked = [f"The result is {record['answer']}."]
    else:
        asked = [c.get("text") or c.get("question") or c["id"] for c in record["constraints"] if c["active"]]
    for made in group.reasoning + group.direct:
        trained, result = made.mode == "cot", made.score
        lines.append({
            "id": record["id"], "task": record["task"], "mode": made.mode, "prompt": record["messages"][-1]["content"],
            "text": made.text, "finish_reason": made.finish_reason,
            "constraints": [{"text": text, "met": met} for text, met in zip(asked, result.verdicts, strict=True)],
            "verdicts": result.verdicts, "guards": result.guards,
            "format": result.format, "accuracy": result.accuracy, "reward": result.total,
            "advantage": made.sequence.advantage if trained else None,
            "kept": trained and not group.why_not, "why": group.why_not if trained else "direct",
            "token_ids": made.sequence.ids[made.sequence.start :],
            "nll": -sum(made.sampled_logp),
        })
    return lines


def rollout_metrics(lines: list[dict]) -> dict:
    """Reward parts, rates and lengths of a step, from the sample lines of all ranks."""

    def mean(values):
        values = list(values)
        return sum(values) / len(values) if values else None

    reasoning = [line for line in lines if line["mode"] == "cot"]
    instructions = [line for line in reasoning if line["task"] == "instruction"]
    direct = [line for line in lines if line["mode"] == "direct"]
    groups: dict[str, list[dict]] = {}
    for line in reasoning:
        groups.setdefault(line["id"], []).append(line)
    tokens = sum(len(line["token_ids"]) for line in reasoning)
    return {
        "reward/mean": mean(line["reward"] for line in reasoning),
        "reward/format": mean(line["format"] for line in reasoning),
        "reward/accuracy": mean(line["accuracy"] for line in reasoning),
        "reward/all_met": mean(all(line["verdicts"]) for line in instructions),
        "reward/all_met_direct": mean(all(line["verdicts"]) for line in direct),
        "reward/math_correct": mean(line["accuracy"] == 2 for line in reasoning if line["task"] == "math"),
        "reward/zero_variance": mean(len({line["reward"] for line in group}) == 1 for group in groups.values()),
        "rollout/format_ok": mean(line["format"] > 0 for line in reasoning),
        "rollout/truncated": mean(line["finish_reason"] == "length" for line in reasoning),
        "rollout/guards": dict(Counter(name for line in reasoning for name in line["guards"])),
        "rollout/skip_rate": mean(group[0]["why"] == "worse than direct" for group in groups.values()
                                  if group[0]["task"] == "instruction"),
        "rollout/skipped_prompts": sum(group[0]["why"] == "worse than direct" for group in groups.values()),
        "rollout/tokens": tokens / max(1, len(reasoning)),
        "rollout/entropy": sum(line["nll"] for line in reasoning) / max(1, tokens),
        "rollout/direct": len(direct),
    }


def dev_metrics(engine, policy, tokenizer, records: list[dict], cfg: Config) -> dict:
    """Greedy answers to development prompts, the ranks' shares put together: what training has reached so far.

    Slips are single faults, such as each capital in an answer that has to be in lower case, per 100 answer tokens.
    """
    if not records:
        return {}
    rank, world = m.init_distributed()
    own = records[rank::world]
    prompts = [m.render_prompt(tokenizer, record["messages"], "cot", cfg.family, record.get("language", "en"))
               for record in own]
    engine.wake()
    engine.sync(policy)
    completions = engine.generate([prompt.ids for prompt in prompts], n=1, max_tokens=cfg.max_new_tokens,
                                  temperature=0.0, seeds=[0] * len(own))
    engine.sleep()
    texts = [prompt.prefill + several[0].text for prompt, several in zip(prompts, completions, strict=True)]
    rows = []
    for record, text, result in zip(own, texts, score(own, texts, family=cfg.family), strict=True):
        answer = parse_response(text, cfg.family).answer
        tokens = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
        rows.append((all(result.verdicts), result.format > 0, count_slips(record, answer), tokens))
    met, well_formed, slips, tokens = (sum(column) for column in zip(*m.gather_objects(rows), strict=True))
    return {"dev/all_met": met / len(records), "dev/format_ok": well_formed / len(records),
            "dev/slips": 100 * slips / max(1, tokens)}


def loss_metrics(totals: Counter, cfg: Config) -> dict:
    """Losses, gradient norms and padding of a step: means over its updates, of all ranks together."""
    summed = {name: m.sum_over_ranks(totals[name]) / cfg.updates
              for name in ("policy_loss", "kl", "clip_share", "bc_loss", "tokens", "slots", "trained")}
    return {
        "loss/policy": summed["policy_loss"],
        "loss/kl": summed["kl"],
        "loss/clip_share": summed["clip_share"],
        "loss/bc": summed["bc_loss"],
        **{f"loss/{name}": totals[name] / cfg.updates for name in ("grad_norm", "grad_norm_policy", "grad_norm_bc")},
        "loss/tokens": summed["trained"] * cfg.updates,
        "loss/padding": 1 - summed["tokens"] / max(1, summed["slots"]),
    }


def warn_if_flat(run: m.Run) -> None:
    """Every ten steps: is there still a group in which rewards differ?"""
    if m.is_main():
        rows = m.read_jsonl(run.folder / "metrics.jsonl")
        if len(rows) % 10 == 0 and all(row["reward/zero_variance"] == 1 for row in rows[-10:]):
            run.say("warning: in the last ten steps no reward differed within a group: nothing is learned; look at "
                    f"{run.folder / 'samples'}: is every answer right, or every one wrong?")


def keep_best(run: m.Run, policy, tokenizer, best: float) -> float:
    """RUN/best is the model with the best mean reward since the save before. All ranks call; returns the best mean."""
    means = []
    if m.is_main():
        rows = m.read_jsonl(run.folder / "metrics.jsonl")
        rows = rows[(len(rows) - 1) // run.cfg.save_every * run.cfg.save_every :]
        means = [sum(row["reward/mean"] for row in rows) / len(rows)]
    mean = m.gather_objects(means)[0]
    if mean > best:
        m.write_model(policy, tokenizer, run.folder / "best")
    return max(best, mean)


def report_rule(run: m.Run, cfg: Config) -> None:
    """How often the superior-CoT rule fired; an error if it never could."""
    if m.is_main():
        rows = m.read_jsonl(run.folder / "metrics.jsonl")
        seen, skipped = (sum(row[name] for row in rows) for name in ("rollout/direct", "rollout/skipped_prompts"))
        print(f"superior-CoT rule: {seen} direct rollouts seen, {skipped} prompts skipped; model in "
              f"{run.folder / 'model'}", file=sys.stderr)
        if cfg.superior_cot and seen == 0:
            raise InputError("the superior-CoT rule never saw a direct rollout: this was not a RAIF run; check that "
                             "--records holds instruction records, or give --no-superior-cot")


def status(metrics: dict, cfg: Config) -> str:
    """One line of about eight numbers; the rest is in metrics.jsonl."""
    shown = {name: metrics[name] or 0.0 for name in ("reward/mean", "reward/all_met", "reward/all_met_direct")}
    line = (f"step {metrics['step']}/{cfg.steps} reward {shown['reward/mean']:+.2f}, all met "
            f"{shown['reward/all_met']:.2f}, direct {shown['reward/all_met_direct']:.2f}, format "
            f"{metrics['rollout/format_ok']:.2f}, {metrics['rollout/tokens']:.0f} tokens, kl {metrics['loss/kl']:.4f}, "
            f"bc {metrics['loss/bc']:.2f}, {metrics['time/rollout'] + metrics['time/update']:.0f} s")
    if "dev/all_met" in metrics:
        line += f" | dev all met {metrics['dev/all_met']:.2f}, {metrics['dev/slips']:.2f} slips per 100 tokens"
    return line


def show(argv) -> None:
    """--show RUN --step N [--id ID]: the rollouts of a step from the samples file, group by group."""
    parser = argparse.ArgumentParser(description=show.__doc__)
    parser.add_argument("--show", required=True, metavar="RUN")
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--id", default="")
    given = parser.parse_args(argv)
    path = Path(given.show) / "samples" / f"step-{given.step:06d}.jsonl"
    lines = [line for line in m.read_jsonl(path) if given.id in ("", line["id"])]
    if not lines:
        raise InputError(f"{path}: {'no rollout of ' + given.id if path.exists() else 'is not there'}; "
                         f"{given.show}/samples holds a file for each finished step")
    last = ""
    for line in lines:
        if line["id"] != last:
            print(f"{'=' * 100}\nstep {given.step}, {line['id']}: {line['prompt']}")
        last = line["id"]
        print(f"{'-' * 100}\n{line['mode']}: reward {line['reward']:+.2f} = format {line['format']:+.0f} and "
              f"accuracy {line['accuracy']:+.2f}", end="")
        if line["advantage"] is not None:
            print(f", advantage {line['advantage']:+.2f}", end="")
        print("; trained on" if line["kept"] else f"; not trained on: {line['why']}")
        for constraint in line["constraints"]:
            print(f"  [{'x' if constraint['met'] else ' '}] {constraint['text']}")
        print(line["text"])


# ---------------------------------------------------------------- the run


def learning_rate(number: int, cfg: Config) -> float:
    """Of update `number`: linear warm-up, then a cosine to a tenth, which --lr-horizon may put beyond the run."""
    return cfg.lr * m.warmup_cosine(number, cfg.lr_horizon or 2 * cfg.steps * cfg.updates, cfg.warmup, 0.1)


def check_settings(cfg: Config) -> Config:
    if cfg.superior_cot and (cfg.direct == 0 or cfg.data == "math"):
        raise InputError(f"--direct {cfg.direct} --data {cfg.data}: the superior-CoT rule compares with direct rollouts"
                         " of instructions and could never fire; give --direct 2 and other --data, or "
                         "--no-superior-cot")
    if cfg.offload != "none" and not cfg.shard:
        raise InputError(f"--offload {cfg.offload}: works with --shard, under torchrun")
    return cfg


def set_up(cfg: Config, policy, tokenizer, dtype):
    """(engine, reference): after a plan of memory and time is printed; with --shard both models are split in place."""
    n_rows = cfg.prompts * (cfg.group + cfg.direct)
    if m.is_main():
        print(m.training_plan(
            policy, dtype=dtype, parts=2 if cfg.bc_coef else 1, shard=cfg.shard, offload=cfg.offload,
            checkpointing=cfg.activation_checkpointing, reference=cfg.kl_coef > 0, engine=cfg.engine,
            engine_share=cfg.engine_share, micro_tokens=cfg.micro_tokens,
            rollout_tokens=n_rows * cfg.max_new_tokens,
            trained_tokens=(n_rows + cfg.bc_batch * cfg.updates) * cfg.max_new_tokens), file=sys.stderr)
    engine = m.make_engine(cfg.engine, policy, tokenizer, dtype=dtype, own_copy=cfg.shard, source=cfg.model,
                           max_length=cfg.max_prompt_tokens + cfg.max_new_tokens, share=cfg.engine_share)
    if cfg.activation_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.shard:  # one model after the other: two whole ones might not fit
        m.shard_model(policy, dtype, offload=cfg.offload == "all")
    reference = m.load_model(cfg.model)[0].requires_grad_(False) if cfg.kl_coef else None
    if cfg.shard and reference is not None:
        m.shard_model(reference, dtype, offload=cfg.offload != "none")
    return engine, reference


def main(argv=None):
    if "--show" in (sys.argv if argv is None else argv):
        return show(argv)
    cfg = check_settings(m.parse_flags(Config, argv, presets=PRESETS))
    rank, world = m.init_distributed()
    m.keep_freed_memory()
    policy, tokenizer = m.load_model(cfg.model)
    pools, dtype = load_pools(cfg, tokenizer), m.compute_dtype(cfg.precision)
    run = m.Run(cfg, cfg.steps, "step")
    judge = m.make_judge(cfg.judge, precision=cfg.precision, cache=run.folder / "judge_cache")
    engine, reference = set_up(cfg, policy, tokenizer, dtype)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    done = run.restore(policy, optimizer, {"step": 0, "best": -math.inf})
    before = {} if done["step"] else dev_metrics(engine, policy, tokenizer, pools["dev"], cfg)

    for step in range(done["step"], cfg.steps):
        # 1. Roll out: G reasoning and H direct responses to each of this rank's prompts.
        with run.clock("rollout"):
            engine.wake()
            engine.sync(policy)
            groups = rollout(engine, tokenizer, prompts_of_step(pools, step, cfg)[rank::world], step, cfg)
            engine.sleep()

        # 2. Score; superior-CoT rule (Eq. 7); group-normalised advantages.
        with run.clock("scoring"):
            score_groups(groups, judge, cfg)
            assign_advantages(groups, cfg)

        # 3. Update: the kept responses of all ranks, shuffled alike everywhere, in cfg.updates parts.
        with run.clock("update"):
            policy.train()
            updates, totals = split_into_updates(groups, step, cfg), Counter()
            if cfg.updates > 1:  # the first is on-policy; the others need the sampling policy's log-probabilities
                store_old_logprobs(policy, [s for sequences, _ in updates[1:] for s in sequences], cfg, dtype)
            for update, (sequences, normalizer) in enumerate(updates):
                number = step * cfg.updates + update
                if not normalizer and not cfg.bc_coef:
                    continue  # every prompt is skipped: no gradient, on any rank
                m.set_lr(optimizer, learning_rate(number, cfg))
                stats = policy_backward(policy, reference, sequences, normalizer, cfg, dtype)
                gradients, experts = {"policy": m.take_gradients(policy)}, []  # of the clipped surrogate and the k3 KL
                if cfg.bc_coef:
                    m.keep_freed_memory(trim=True)
                    experts = experts_of_update(pools, number, cfg)[rank::world]
                    stats["bc_loss"] = cloning_backward(policy, experts, cfg.bc_batch, cfg, dtype)
                    gradients["bc"] = m.take_gradients(policy)  # of behaviour cloning (Eq. 8)
                stats["trained"] = sum(len(sequence.ids) for sequence in sequences + experts)
                stats |= m.optimizer_step(policy, optimizer, gradients, number, sequences + experts, run.folder)
                totals.update(stats)
            policy.eval()

        # 4. Books: one line of metrics, every rollout with its verdicts and fate, the best model, a checkpoint.
        lines = m.gather_objects([line for group in groups for line in sample_lines(group)])
        metrics = {"step": step + 1, **rollout_metrics(lines), **loss_metrics(totals, cfg), **engine_mismatch(groups),
                   "loss/lr": optimizer.param_groups[0]["lr"]}
        metrics |= {f"{name}_before": value for name, value in before.items() if step == 0}
        regular = (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps
        if regular:
            with run.clock("dev"):
                metrics |= dev_metrics(engine, policy, tokenizer, pools["dev"], cfg)
        metrics = run.log(metrics, lines)
        run.say(status(metrics, cfg))
        warn_if_flat(run)
        done["step"] = step + 1
        if regular:
            done["best"] = keep_best(run, policy, tokenizer, done["best"])
        run.save_or_stop(policy, optimizer, done, regular)
    m.write_model(policy, tokenizer, run.folder / "model")
    run.bar.close()
    report_rule(run, cfg)


if __name__ == "__main__":
    m.launch(main)
