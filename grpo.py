"""Stage 3: GRPO with the superior-CoT rule and the behaviour-cloning term (RAIF, arXiv 2506.01413, section 3).

    python grpo.py                                             # SmolLM2-135M from runs/sft/model
    torchrun --standalone --nproc-per-node 2 grpo.py           # the same gradient from two processes
    torchrun --nproc-per-node 4 grpo.py --preset paper-1.5b --records FILE
    python grpo.py --resume                                    # continue a run: bit for bit the same weights on CPU
    python grpo.py --show runs/grpo --step 3 [--id rl-0012]    # one step's rollouts in the terminal, group by group

    python grpo.py --help metrics                              # what each number of metrics.jsonl means, when to worry

Life of a prompt: record -> prompt ids -> G reasoning + H direct (no-think) rollouts -> scores -> rewards_PG,
keep_P, advantages_PG -> micro-batches -> logp, old, ref -> loss + BC -> optimizer step -> log line and samples file.
Names: P prompts, G reasoning and H direct rollouts per prompt, B sequences, R response tokens (T in grpo_loss).

What RAIF adds to GRPO, and where:
1. H direct rollouts per prompt, with an empty thought, are scored but not trained on (rollout, score_groups).
2. The superior-CoT rule, Eq. 7 (superior_cot_mask): a prompt on which every reasoning rollout is worse than every
   direct one leaves the update and its counts. On a tie the prompt stays.
3. Expert answers are cloned in every update, Eq. 8 (cloning_backward).
So the gradient of SFT is one call, sft.cross_entropy_backward; that of GRPO policy_backward; that of RAIF
policy_backward and cloning_backward. As in plain GRPO there is no critic, no discounting and no KL in the reward.

What differs from the released code: rewards score the answer, not the label; direct rollouts get their real score, so
the rule can fire; mean and std are those of the reasoning rollouts alone; skipped prompts contribute nothing; cloning
trains on answer tokens alone; a truncated rollout is flagged, its last token is not overwritten.
"""

import math
import random
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

import model as m
from rewards import InputError, Score, count_slips, load_reward, parse_response, read_records, score


@dataclass
class Config:
    # the run
    model: str = "runs/sft/model"  # initial policy and reference policy; the paper's rows start from an instruct model
    records: str = "runs/evolve/rl.jsonl"  # prompts of the rollouts; data/rl.jsonl if evolve.py never ran
    experts: str = ""  # records with expert answers to clone (default: train.jsonl next to --records, else --records)
    out: str = "runs/grpo"  # run folder
    steps: int = 6  # rollout batches
    seed: int = 0  # of data order and sampling
    resume: bool = False  # continue the run in --out with its own settings
    force: bool = False  # with --resume: take a changed setting even if it changes the course of the run
    # scale: a laptop's values
    prompts: int = 4  # P, prompts per rollout batch, over all processes
    group: int = 6  # G, reasoning rollouts per prompt (math prompts get group + direct of them)
    direct: int = 2  # H, direct (no-think) rollouts per instruction prompt
    updates: int = 1  # optimizer steps per rollout batch; the first is exactly on-policy
    bc_batch: int = 8  # expert answers per update; the paper has one per rollout
    max_new_tokens: int = 200  # response limit
    temperature: float = 1.0  # sampling temperature; top-p and top-k stay off
    lr: float = 3e-5  # peak learning rate
    # the objective: the paper's values
    clip_eps: float = 0.2  # ε of the clipped surrogate
    kl_coef: float = 0.001  # weight of the k3 KL to the initial policy; 0 = no reference model
    bc_coef: float = 1.0  # λ of the behaviour-cloning term (Eq. 8); 0 = off
    superior_cot: bool = True  # skip prompts on which every reasoning rollout is worse than every direct one (Eq. 7)
    math_ratio: float = 0.1  # math prompts per instruction prompt (the paper's main runs: 1)
    # variants of the objective; the defaults are the paper's
    loss: Literal["grpo", "dapo", "dr_grpo"] = "grpo"  # weight of a token: see token_weights
    clip_high: float = 0.0  # ε above 1 (DAPO's clip-higher); 0 = clip_eps
    advantage: Literal["group_norm", "mean_only", "none"] = "group_norm"  # (R − mean) / std, R − mean, or R itself
    reward: str = "raif"  # raif, fraction, all or rules_x_judge (rewards.VARIANTS), or your own as FILE.py:FUNCTION
    drop_zero_variance: bool = False  # groups of equal rewards leave the update: they add no KL and are not counted
    data: Literal["mixed", "complex", "math"] = "mixed"  # which records: both at math_ratio, or one kind alone
    # judges and the answer format
    judge: str = ""  # answers judge questions: NAME (loaded here) or NAME@URL; the paper's: Qwen/Qwen2.5-7B-Instruct
    code_only: bool = False  # switch off judge constraints, and leave out records that have no others
    family: Literal["cold", "warm"] = "cold"  # answer format: think and answer tags, or think tags alone (R1 style)
    # logging and checkpoints
    dev: str = ""  # prompts never trained on, for a curve (default: dev.jsonl next to --records, if it is there)
    dev_prompts: int = 32  # number answered greedily at the start and at every save; 0 = no curve
    save_every: int = 3  # steps between checkpoints
    keep: int = 1  # checkpoints kept; the model with the best rewards since the save before is kept in RUN/best
    log: str = ""  # trackers besides metrics.jsonl: tensorboard, wandb, or both with a comma
    # machine
    warmup: float = 0.03  # share of lr_horizon with linear warm-up
    lr_horizon: int = 0  # optimizer steps until the cosine reaches a tenth of the peak; 0 = twice the run
    max_prompt_tokens: int = 1024  # records with longer prompts are not rolled out
    micro_tokens: int = 1024  # tokens per micro-batch, padding included
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # arithmetic; master weights are float32
    engine: Literal["hf", "vllm"] = "hf"  # rollout engine; vllm: CUDA only, under torchrun
    engine_share: float = 0.4  # part of the GPU memory that vllm may take
    shard: bool = False  # FSDP2: weights, gradients and optimizer split over all processes
    offload: Literal["none", "reference", "all"] = "none"  # with --shard: keep reference, or all, in host memory
    activation_checkpointing: bool = False  # compute activations again in the backward pass: less memory, slower


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
    only be reinforced for being the least bad. On a tie it stays, and without direct rollouts (math, H = 0) as well.
    """
    if direct_PH.shape[1] == 0:
        return torch.ones(len(reasoning_PG), dtype=torch.bool, device=reasoning_PG.device)
    return reasoning_PG.amax(1) >= direct_PH.amin(1)


def token_weights(mask_BT, variant: str, rows: int, tokens: int, limit: int) -> torch.Tensor:
    """Weight of each token in the loss, (B, T) float64, 0 outside the mask.

    rows, tokens: how many responses and response tokens the whole update has, over all micro-batches and ranks, so that
    these add up to the same gradient. limit: --max-new-tokens.
    """
    length_B1 = mask_BT.sum(1, keepdim=True).clamp(min=1)
    divisors = {
        "grpo": rows * length_B1,  # the mean of the rows' token means: every response counts the same
        "dapo": tokens,  # the mean over all tokens: long responses count more
        "dr_grpo": rows * limit,  # a constant: no bonus for a short right response or a long wrong one
    }
    return mask_BT.double() / divisors[variant]


def grpo_loss(logp_BT, old_logp_BT, ref_logp_BT, advantages_B, mask_BT, *, clip_eps=0.2, kl_coef=0.001,
              normalizer=None, clip_high=None, weights_BT=None):
    """Clipped surrogate + k3 KL: the sum over rows of each row's token mean, divided by `normalizer` (None = B).

    mask_BT: True on response tokens. A row with an empty mask contributes 0, and whatever stands at masked positions
    changes nothing. ref_logp_BT may be None when kl_coef is 0. -> (loss, stats); the stats are weighted like the loss
    and add up like it. clip_high: another ε above 1. weights_BT: the weights of the tokens instead of those that
    `normalizer` gives; the trainer passes token_weights of the whole update.
    """
    mask_BT = mask_BT.bool()
    if weights_BT is None:
        weights_BT = token_weights(mask_BT, "grpo", normalizer or len(logp_BT), 0, 0)
    weights_BT = weights_BT.to(logp_BT.dtype)
    # Masked before anything is exponentiated: exp of garbage is inf, and inf · 0 is NaN in the backward pass.
    log_ratio_BT = torch.where(mask_BT, logp_BT - old_logp_BT.detach(), 0.0)
    advantages_B1 = advantages_B[:, None]

    # L_policy = −mean_i mean_t min(ρ A, clip(ρ, 1−ε, 1+ε) A), ρ = π_θ / π_old
    ratio_BT = log_ratio_BT.exp()
    clipped_BT = ratio_BT.clamp(1 - clip_eps, 1 + (clip_high or clip_eps))
    surrogate_BT = torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)
    policy_loss = -(weights_BT * torch.where(mask_BT, surrogate_BT, 0.0)).sum()

    # L_KL = mean_i mean_t (exp(−Δ) − 1 + Δ), Δ = log π_θ − log π_ref  (k3: unbiased, never negative)
    kl = torch.zeros_like(policy_loss)
    if kl_coef:
        delta_BT = torch.where(mask_BT, logp_BT - ref_logp_BT.detach(), 0.0)
        kl = (weights_BT * (torch.exp(-delta_BT) - 1 + delta_BT)).sum()

    binding_BT = (ratio_BT - clipped_BT) * advantages_B1 > 0  # the clip holds back this token's gradient
    clip_share = (weights_BT * binding_BT).sum()
    return policy_loss + kl_coef * kl, {"policy_loss": policy_loss.item(), "kl": kl.item(),
                                        "clip_share": clip_share.item()}


# ---------------------------------------------------------------- the update


@dataclass
class Rollout:
    """One response, from sampling to its line in the samples file."""

    mode: str  # "cot": with reasoning, trained on; "direct": with an empty thought, compared with
    sequence: m.Sequence  # prompt and response; carries advantage and log-probabilities through the update
    text: str  # the whole assistant turn, what the prompt has opened included
    finish_reason: str  # "stop" or "length"
    score: Score | None = None


@dataclass
class Group:
    """The rollouts of one prompt."""

    record: dict
    reasoning: list[Rollout] = field(default_factory=list)  # G
    direct: list[Rollout] = field(default_factory=list)  # H
    skip_reason: str = ""  # why it is not trained on ("worse than direct", "zero variance"); empty if it is


@dataclass
class Update:
    """What one optimizer step trains on: the responses of this rank, and the counts over all ranks."""

    sequences: list[m.Sequence]
    rows: int
    tokens: int


def split_into_updates(groups: list[Group], step: int, cfg: Config) -> list[Update]:
    """The kept responses of all ranks, shuffled alike on every rank and cut into cfg.updates parts.

    Skipped prompts are in no part, and so in no count.
    """
    own = {}
    for group in groups:
        if not group.skip_reason:
            own |= {(group.record["id"], i): response.sequence for i, response in enumerate(group.reasoning)}
    lengths = dict(m.gather_objects([(key, len(sequence.ids) - sequence.start) for key, sequence in own.items()]))
    keys = sorted(lengths)
    random.Random(f"{cfg.seed}/shuffle/{step}").shuffle(keys)
    updates = []
    for u in range(cfg.updates):
        part = keys[u * len(keys) // cfg.updates : (u + 1) * len(keys) // cfg.updates]
        tokens = sum(lengths[key] for key in part)
        updates.append(Update([own[key] for key in part if key in own], len(part), tokens))
    return updates


def policy_backward(policy, reference, update: Update, cfg: Config, dtype) -> Counter:
    """Accumulate the gradient of L_policy + kl_coef · L_KL over an update's sequences; returns the summed stats."""
    totals = Counter()
    for packs, weight in m.rank_micro_batches(update.sequences, cfg.micro_tokens):  # weight: 1, for a dummy 0
        batch, ref_logp_BR = [sequence for pack in packs for sequence in pack], None
        if reference is not None:
            with torch.no_grad():
                ref_logp_BR, _ = m.row_logprobs(reference, packs, dtype, cfg.temperature)
        logp_BR, mask_BR = m.row_logprobs(policy, packs, dtype, cfg.temperature)
        if batch[0].old_logp is None:  # first update: the policy still is the one that sampled (store_old_logprobs)
            m.set_old_logp(packs, logp_BR, mask_BR)
        old_logp_BR = torch.zeros_like(logp_BR)
        old_logp_BR[mask_BR] = torch.cat([sequence.old_logp for sequence in batch])
        advantages_B = torch.tensor([s.advantage for s in batch], dtype=logp_BR.dtype, device=logp_BR.device)
        weights_BR = token_weights(mask_BR, cfg.loss, update.rows, update.tokens, cfg.max_new_tokens)
        loss, stats = grpo_loss(logp_BR, old_logp_BR, ref_logp_BR, advantages_B, mask_BR, clip_eps=cfg.clip_eps,
                                kl_coef=cfg.kl_coef, clip_high=cfg.clip_high, weights_BT=weights_BR)
        (weight * loss).backward()
        totals.update({name: weight * value for name, value in stats.items()})
    return totals


def cloning_backward(policy, experts: list[m.Sequence], cfg: Config, dtype) -> Counter:
    """Accumulate the gradient of λ · mean_i mean_t −log π_θ(ỹ|x̃) (Eq. 8), i over the bc_batch experts of all ranks."""
    totals = Counter()
    for packs, weight in m.rank_micro_batches(experts, cfg.micro_tokens):
        logp_BR, mask_BR = m.row_logprobs(policy, packs, dtype)
        loss = -weight * (logp_BR.sum(1) / mask_BR.sum(1)).sum() / cfg.bc_batch
        (cfg.bc_coef * loss).backward()
        totals["bc_loss"] += loss.item()
    return totals


def store_old_logprobs(policy, updates: list[Update], cfg: Config, dtype) -> None:
    """Fill in old_logp: the sampling policy's log-probabilities, needed once the policy moves on."""
    sequences = [sequence for update in updates for sequence in update.sequences]
    batches = m.rank_micro_batches(sequences, cfg.micro_tokens)
    m.store_logprobs(policy, [packs for packs, _ in batches], dtype, cfg.temperature)


# ---------------------------------------------------------------- data


def render(records: list[dict], tokenizer, cfg: Config) -> list[dict]:
    """Give each record its prompts by mode, record["prompts"]; -> the records within --max-prompt-tokens."""
    for record in records:
        record["prompts"] = {mode: m.render_prompt(tokenizer, record["messages"], mode, cfg.family,
                                                   record.get("language", "en"))
                             for mode in ("cot", "direct")}
    return m.filter_and_count(records, lambda record: len(record["prompts"]["cot"].ids) <= cfg.max_prompt_tokens,
                              f"prompts exceed {cfg.max_prompt_tokens} tokens")


def deactivate_judge_constraints(records: list[dict]) -> list[dict]:
    """Switch off the judge constraints of the records; -> the records that have others."""
    for record in records:
        for constraint in record.get("constraints", []):
            constraint["active"] &= constraint["kind"] == "code"
    return m.filter_and_count(records, lambda r: r["task"] == "math" or any(c["active"] for c in r["constraints"]),
                              "records have no active code constraint")


def load_pools(cfg: Config, tokenizer) -> dict[str, list]:
    """{"instruction", "math"}: records to roll out; {"expert"}: sequences to clone; {"dev"}: records of the curve.

    Rollouts start from --records. Cloned are the answers of --experts: on a laptop other requests, so that rollouts
    are about what SFT has not seen; in the paper the same ones. Whatever is left out is counted on stderr.
    """
    path = m.records_path(cfg.records, Config.records, "rl")
    neighbour = path.with_name("teacher.jsonl" if path.parent == m.data_dir else "train.jsonl")
    expert_path = Path(cfg.experts or (neighbour if neighbour.exists() else path))
    records = read_records(path)
    if cfg.code_only:
        records = deactivate_judge_constraints(records)
    records, limit = render(records, tokenizer, cfg), cfg.max_prompt_tokens + cfg.max_new_tokens
    pools = {
        "instruction": [record for record in records if record["task"] == "instruction" and cfg.data != "math"],
        "math": [record for record in records if record["task"] == "math" and cfg.data != "complex"],
        "expert": m.load_experts(expert_path, tokenizer, cfg.family, limit),
        "dev": load_dev(cfg, path, tokenizer),
    }
    if not pools["instruction"] and cfg.data != "math":
        raise InputError(f"{path}: no instruction record within {cfg.max_prompt_tokens} prompt tokens; run "
                         "python evolve.py or raise --max-prompt-tokens")
    judged = [record["id"] for record in pools["instruction"]
              if any(c["kind"] == "judge" and c["active"] for c in record["constraints"])]
    if judged and not cfg.judge:
        raise InputError(f"{path}: record {judged[0]!r} ({len(judged)} such) has a judge constraint; "
                         "give --judge NAME (loaded here) or NAME@URL (served), or --code-only to leave it out")
    if not pools["math"] and math_share(cfg) > 0:
        raise InputError(f"{path}: --data {cfg.data}, --math-ratio {cfg.math_ratio} but no record has task 'math'; add "
                         "math records (python evolve.py does) or give --math-ratio 0")
    if cfg.bc_coef and not pools["expert"]:
        raise InputError(f"{expert_path}: --bc-coef {cfg.bc_coef} but no record has the field 'expert' within {limit} "
                         "tokens; give --experts a file with expert answers (python evolve.py writes train.jsonl), a "
                         "larger --max-new-tokens, or --bc-coef 0")
    return pools


def load_dev(cfg: Config, records_path: Path, tokenizer) -> list[dict]:
    """--dev-prompts development records at even distances; none where there is no file, and none that need a judge."""
    path = Path(cfg.dev or records_path.with_name("dev.jsonl"))
    if cfg.dev_prompts == 0 or not (cfg.dev or path.exists()):
        return []
    usable = [record for record in deactivate_judge_constraints(read_records(path)) if record["task"] == "instruction"]
    return m.spread(render(usable, tokenizer, cfg), cfg.dev_prompts)


def draw(pool: list, name: str, start: int, count: int, seed: int) -> list:
    """Items start … start + count of an endless stream that passes through the pool in a new order each time."""
    items, orders = [], {}  # orders: the pool as it is passed through in each turn
    for i in range(start, start + count):
        turn, place = divmod(i, len(pool))
        if turn not in orders:
            orders[turn] = random.Random(f"{seed}/{name}/{turn}").sample(pool, len(pool))
        items.append(orders[turn][place])
    return items


def math_share(cfg: Config) -> float:
    """Share of math among the prompts."""
    return {"mixed": cfg.math_ratio / (1 + cfg.math_ratio), "complex": 0.0, "math": 1.0}[cfg.data]


def prompts_of_step(pools, step: int, cfg: Config) -> list[dict]:
    """The P records of a step, a function of (seed, step): resuming needs no cursor. Math comes at its ratio."""
    math_a_step = cfg.prompts * math_share(cfg)
    before = math.floor(step * math_a_step + 1e-9)  # math prompts of the steps before
    n_math = math.floor((step + 1) * math_a_step + 1e-9) - before
    records = draw(pools["instruction"], "instruction", step * cfg.prompts - before, cfg.prompts - n_math, cfg.seed)
    records += draw(pools["math"], "math", before, n_math, cfg.seed)
    # A record twice in a step (small pools only) would roll out the same twice: once is enough.
    return list({record["id"]: record for record in records}.values())


def experts_of_update(pools, number: int, cfg: Config) -> list[m.Sequence]:
    """The expert answers that update `number` clones, over all ranks: other ones in every update."""
    return draw(pools["expert"], "expert", number * cfg.bc_batch, cfg.bc_batch, cfg.seed)


# ---------------------------------------------------------------- rollouts and rewards


def rollout(engine, policy, records: list[dict], step: int, cfg: Config) -> list[Group]:
    """G reasoning and H direct rollouts of each record by the present policy; math has G + H with reasoning."""
    groups = [Group(record) for record in records]
    jobs = []  # (where the rollouts go, mode, record, how many)
    for group in groups:
        if group.record["task"] == "math":
            jobs.append((group.reasoning, "cot", group.record, cfg.group + cfg.direct))
        else:
            jobs.append((group.reasoning, "cot", group.record, cfg.group))
            if cfg.direct:
                jobs.append((group.direct, "direct", group.record, cfg.direct))
    engine.wake()
    engine.sync(policy)
    completions = engine.generate(
        [record["prompts"][mode].ids for _, mode, record, _ in jobs], n=[count for *_, count in jobs],
        max_tokens=cfg.max_new_tokens, temperature=cfg.temperature, stop=(),
        seeds=[m.record_seed(cfg.seed, step, f"{record['id']}/{mode}") for _, mode, record, _ in jobs],
    )
    engine.sleep()
    for (rollouts, mode, record, _), of_job in zip(jobs, completions, strict=True):
        prompt = record["prompts"][mode]
        for c in of_job:
            sequence = m.Sequence(prompt.ids + c.token_ids, len(prompt.ids), sampled_logp=c.logprobs)
            rollouts.append(Rollout(mode, sequence, prompt.prefill + c.text, c.finish_reason))
    return groups


def score_groups(groups: list[Group], judge, cfg: Config) -> None:
    """Give each rollout its Score; direct ones are scored by their answer alone."""
    for direct in (False, True):
        pairs = [(group.record, r) for group in groups for r in (group.direct if direct else group.reasoning)]
        scores = score([record for record, _ in pairs], [r.text for _, r in pairs], judge=judge,
                       family=cfg.family, direct=direct, variant=cfg.reward,
                       truncated=[r.finish_reason == "length" for _, r in pairs])
        for (_, response), result in zip(pairs, scores, strict=True):
            response.score = result


def assign_advantages(groups: list[Group], cfg: Config) -> None:
    """Give each reasoning rollout its advantage, and each group that is left out of the update the reason."""
    for task in ("instruction", "math"):  # an instruction has G reasoning and H direct rollouts, math G + H and none
        part = [group for group in groups if group.record["task"] == task]
        if not part:
            continue
        # Mean and std are those of the reasoning rollouts alone (the released code mixes the direct ones in).
        rewards_PG = torch.tensor([[r.score.total for r in g.reasoning] for g in part], dtype=torch.float64)
        accuracy_PG = torch.tensor([[r.score.accuracy for r in g.reasoning] for g in part], dtype=torch.float64)
        direct_PH = torch.tensor([[r.score.accuracy for r in g.direct] for g in part], dtype=torch.float64)
        advantages_PG = {
            "group_norm": group_advantages(rewards_PG),
            "mean_only": rewards_PG - rewards_PG.mean(1, keepdim=True),
            "none": rewards_PG,
        }[cfg.advantage]
        keep_P = superior_cot_mask(accuracy_PG, direct_PH)
        zero_variance_P = rewards_PG.amax(1) == rewards_PG.amin(1)
        for p, group in enumerate(part):
            if cfg.superior_cot and not keep_P[p]:
                group.skip_reason = "worse than direct"
            elif cfg.drop_zero_variance and zero_variance_P[p]:
                group.skip_reason = "zero variance"
            for response, advantage in zip(group.reasoning, advantages_PG[p].tolist(), strict=True):
                response.sequence.advantage = advantage


# ---------------------------------------------------------------- logging


def sample_lines(groups: list[Group]) -> list[dict]:
    """The rollouts of all ranks as lines of the samples file, each of which can be read alone.

    Prompt, text, each constraint with its verdict, reward parts, advantage, and whether it was trained on, or why not.
    """
    lines = []
    for group in groups:
        record = group.record
        if record["task"] == "math":
            requirements = [f"The result is {record['answer']}."]
        else:
            requirements = [c.get("text") or c.get("question") or c["id"] for c in record["constraints"] if c["active"]]
        for response in group.reasoning + group.direct:
            result, trainable, sampled_logp = response.score, response.mode == "cot", response.sequence.sampled_logp
            why = group.skip_reason if trainable else "direct"
            verdicts = zip(requirements, result.verdicts, strict=True)
            lines.append({
                "id": record["id"], "task": record["task"], "mode": response.mode,
                "prompt": record["messages"][-1]["content"], "text": response.text,
                "constraints": [{"text": text, "met": met} for text, met in verdicts],
                "reward": result.total, "format": result.format, "accuracy": result.accuracy,
                "verdicts": result.verdicts, "guards": result.guards,
                "all_met": all(result.verdicts), "format_ok": result.format_ok,
                "finish_reason": response.finish_reason, "truncated": response.finish_reason == "length",
                "advantage": response.sequence.advantage if trainable else None, "kept": not why, "why": why,
                "tokens": len(sampled_logp), "nll": -sum(sampled_logp),
                "token_ids": response.sequence.ids[response.sequence.start :],
            })
    return m.gather_objects(lines)


def mean(lines: list[dict], name: str) -> float | None:
    """Mean of a field of sample lines; None where there are none."""
    if not lines:
        return None
    return sum(line[name] for line in lines) / len(lines)


def rollout_metrics(lines: list[dict]) -> dict:
    """Reward parts, rates and lengths of a step, from the sample lines of all ranks."""
    reasoning = [line for line in lines if line["mode"] == "cot"]
    direct = [line for line in lines if line["mode"] == "direct"]
    instructions = [line for line in reasoning if line["task"] == "instruction"]
    math_lines = [line for line in reasoning if line["task"] == "math"]
    rewards = {}
    for line in reasoning:
        rewards.setdefault(line["id"], set()).add(line["reward"])
    prompts = {line["id"] for line in instructions}
    skipped = {line["id"] for line in instructions if line["why"] == "worse than direct"}
    tokens = sum(line["tokens"] for line in reasoning)
    return {
        "reward/mean": mean(reasoning, "reward"),
        "reward/format": mean(reasoning, "format"),
        "reward/accuracy": mean(reasoning, "accuracy"),
        "reward/all_met": mean(instructions, "all_met"),
        "reward/all_met_direct": mean(direct, "all_met"),
        "reward/math_correct": mean(math_lines, "all_met"),
        "reward/zero_variance": sum(len(values) == 1 for values in rewards.values()) / max(1, len(rewards)),
        "rollout/format_ok": mean(reasoning, "format_ok"),
        "rollout/truncated": mean(reasoning, "truncated"),
        "rollout/guards": Counter(name for line in reasoning for name in line["guards"]),
        "rollout/skip_rate": len(skipped) / max(1, len(prompts)),
        "rollout/skipped_prompts": len(skipped),
        "rollout/tokens": mean(reasoning, "tokens"),
        "rollout/entropy": sum(line["nll"] for line in reasoning) / max(1, tokens),
        "rollout/direct": len(direct),
    }


def update_metrics(totals: Counter, updates: list[Update], cfg: Config) -> dict:
    """Losses and gradient norms of a step, of all ranks together: means over its updates; its tokens, its failures."""
    metrics = m.engine_gap([sequence for update in updates for sequence in update.sequences])
    metrics |= {"loss/tokens": m.sum_over_ranks(totals["trained"]), "loss/nonfinite": totals["nonfinite"]}
    for name in ("policy_loss", "kl", "clip_share", "bc_loss"):
        metrics["loss/" + name.removesuffix("_loss")] = m.sum_over_ranks(totals[name]) / cfg.updates
    for name in ("grad_norm", "grad_norm_policy", "grad_norm_bc"):  # of all ranks already, and of finite updates alone
        metrics["loss/" + name] = totals[name] / (cfg.updates - totals["nonfinite"] or math.nan)
    return metrics


def dev_metrics(engine, policy, tokenizer, records: list[dict], cfg: Config) -> dict:
    """Greedy answers to development prompts, the ranks' shares put together: what training has reached so far.

    Slips are single faults, such as each capital in an answer that has to be in lower case, per 100 answer tokens.
    """
    if not records:
        return {}
    rank, world = m.init_distributed()
    greedy = replace(cfg, group=1, direct=0, temperature=0.0, reward="raif")
    groups = rollout(engine, policy, records[rank::world], 0, greedy)
    score_groups(groups, None, greedy)
    lines, by_id = sample_lines(groups), {record["id"]: record for record in records}
    answers = [parse_response(line["text"], cfg.family).answer for line in lines]
    slips = sum(count_slips(by_id[line["id"]], answer) for line, answer in zip(lines, answers, strict=True))
    tokens = sum(map(len, tokenizer(answers, add_special_tokens=False)["input_ids"]))
    return {"dev/all_met": mean(lines, "all_met"), "dev/format_ok": mean(lines, "format_ok"),
            "dev/slips": 100 * slips / max(1, tokens)}


def report_rule(run: m.Run, cfg: Config) -> None:
    """How often the superior-CoT rule fired; an error if it never could."""
    direct = sum(row["rollout/direct"] for row in run.history)
    skipped = sum(row["rollout/skipped_prompts"] for row in run.history)
    run.say(f"superior-CoT rule: {direct} direct rollouts seen, {skipped} prompts skipped; model in "
            f"{run.folder}/model")
    if cfg.superior_cot and direct == 0:
        raise InputError("the superior-CoT rule never saw a direct rollout: this was not a RAIF run; check that "
                         "--records holds instruction records, or give --no-superior-cot")


STATUS = ("step {step} reward {reward/mean:+.2f}, all met {reward/all_met:.2f}, direct {reward/all_met_direct:.2f}, "
          "format {rollout/format_ok:.2f}, {rollout/tokens:.0f} tokens, kl {loss/kl:.4f}, bc {loss/bc:.2f}, "
          "{time/rollout:.0f} + {time/update:.0f} s")
STATUS_DEV = " | dev all met {dev/all_met:.2f}, {dev/slips:.2f} slips per 100 tokens"


def report_step(run: m.Run) -> None:
    """One line of about ten numbers, the rest is in metrics.jsonl; every ten steps: do rewards still differ?"""
    shown = {name: value or 0.0 for name, value in run.history[-1].items()}
    run.say((STATUS + STATUS_DEV if "dev/all_met" in shown else STATUS).format_map(shown))
    if run.step % 10 == 0 and all(row["reward/zero_variance"] == 1 for row in run.history[-10:]):
        run.say("warning: in the last ten steps no reward differed within a group: nothing is learned; look at "
                f"{run.folder}/samples: is every answer right, or every one wrong?")


# ---------------------------------------------------------------- the run


def learning_rate(number: int, cfg: Config) -> float:
    """Learning rate of update `number`: warm-up, then a cosine to a tenth; --lr-horizon may put its end beyond the run.
    """
    return cfg.lr * m.warmup_cosine(number, cfg.lr_horizon or 2 * cfg.steps * cfg.updates, cfg.warmup, 0.1)


def check_settings(cfg: Config) -> Config:
    if cfg.superior_cot and (cfg.direct == 0 or cfg.data == "math"):
        raise InputError(f"--direct {cfg.direct} --data {cfg.data}: the superior-CoT rule compares with direct rollouts"
                         " of instructions and could never fire; give --direct 2 and other --data, or "
                         "--no-superior-cot")
    if cfg.offload != "none" and not cfg.shard:
        raise InputError(f"--offload {cfg.offload}: works with --shard, under torchrun")
    load_reward(cfg.reward)  # an unknown one is an error now, not after the first rollouts
    return cfg


def set_up(cfg: Config, policy, tokenizer, dtype):
    """(engine, reference): after a plan of memory and time is printed; with --shard both models are split in place."""
    m.print_plan(policy, cfg, dtype)
    engine = m.make_engine(cfg.engine, policy, tokenizer, dtype=dtype, own_copy=cfg.shard, source=cfg.model,
                           max_length=cfg.max_prompt_tokens + cfg.max_new_tokens, share=cfg.engine_share)
    m.prepare(policy, cfg, dtype)  # one model after the other: two whole ones might not fit
    reference = None
    if cfg.kl_coef:
        reference = m.load_model(cfg.model)[0].requires_grad_(False)
        if cfg.shard:
            m.shard_model(reference, dtype, offload=cfg.offload != "none")
    return engine, reference


def main(argv=None):
    if "--show" in (sys.argv if argv is None else argv):
        return m.show_samples(argv)
    cfg = check_settings(m.parse_flags(Config, argv, presets=PRESETS))
    rank, world = m.init_distributed()
    m.keep_freed_memory()
    policy, tokenizer = m.load_model(cfg.model)
    pools, dtype = load_pools(cfg, tokenizer), m.compute_dtype(cfg.precision)
    run = m.Run(cfg, cfg.steps, "step")
    judge = m.make_judge(cfg.judge, precision=cfg.precision, cache=run.folder / "judge_cache")
    engine, reference = set_up(cfg, policy, tokenizer, dtype)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    run.restore(policy, optimizer)

    for step in range(run.step, cfg.steps):
        before = dev_metrics(engine, policy, tokenizer, pools["dev"], cfg) if step == 0 else {}

        # 1. Roll out: G reasoning and H direct responses to each of this rank's prompts.
        with run.clock("rollout"):
            groups = rollout(engine, policy, prompts_of_step(pools, step, cfg)[rank::world], step, cfg)

        # 2. Score; superior-CoT rule (Eq. 7) and group-normalised advantages, both in assign_advantages.
        with run.clock("scoring"):
            score_groups(groups, judge, cfg)
            assign_advantages(groups, cfg)

        # 3. Update: the kept responses of all ranks, shuffled alike everywhere, in cfg.updates parts.
        with run.clock("update"):
            policy.train()
            updates, totals = split_into_updates(groups, step, cfg), Counter()
            store_old_logprobs(policy, updates[1:], cfg, dtype)  # the first is on-policy, the policy moves after it
            for number, update in enumerate(updates, step * cfg.updates):
                if not update.rows and not cfg.bc_coef:
                    continue  # every prompt is skipped: no gradient, on any rank
                m.set_lr(optimizer, learning_rate(number, cfg))
                totals.update(policy_backward(policy, reference, update, cfg, dtype))
                gradients, experts = {"policy": m.take_gradients(policy)}, []  # clipped surrogate and k3 KL
                if cfg.bc_coef:
                    experts = experts_of_update(pools, number, cfg)[rank::world]
                    totals.update(cloning_backward(policy, experts, cfg, dtype))
                    gradients["bc"] = m.take_gradients(policy)  # behaviour cloning (Eq. 8)
                trained = update.sequences + experts
                totals.update(m.optimizer_step(policy, optimizer, gradients, number, trained, run.folder))
            policy.eval()

        # 4. Log: a line of metrics, every rollout with its verdicts and fate, the best model, a checkpoint.
        lines, save = sample_lines(groups), (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps
        metrics = {"step": step + 1, **rollout_metrics(lines), **update_metrics(totals, updates, cfg),
                   **m.judge_counts(judge), "loss/lr": optimizer.param_groups[0]["lr"]}
        metrics |= {f"{name}_before": value for name, value in before.items()}
        if save:
            with run.clock("dev"):
                metrics |= dev_metrics(engine, policy, tokenizer, pools["dev"], cfg)
        run.log(metrics, lines)
        report_step(run)
        if save:
            run.keep_best(policy, tokenizer, "reward/mean")
        run.save_or_stop(policy, optimizer, save)
    m.write_model(policy, tokenizer, run.folder / "model")
    report_rule(run, cfg)


if __name__ == "__main__":
    m.launch(main)
