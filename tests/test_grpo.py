"""grpo.py: the objective against its formulas, the reward path, data order, parallel runs, resuming, learning."""

import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    ROOT,
    build_model,
    build_tokenizer,
    last_step,
    make_records,
    math_records,
    run_stage,
    write_records,
)

import grpo
import model as m
from rewards import InputError

CLIP, KL = 0.2, 0.001


def reference_loss(logp, old, ref, advantages, lengths, clip=CLIP, kl=KL, normalizer=None):
    """The objective written out row by row and token by token from the formulas, with Python floats' care."""
    total = 0.0
    for row, (advantage, length) in enumerate(zip(advantages, lengths, strict=True)):
        if length == 0:
            continue
        row_sum = 0.0
        for t in range(length):
            ratio = torch.exp(logp[row, t] - old[row, t])
            clipped = torch.clamp(ratio, 1 - clip, 1 + clip)
            surrogate = torch.minimum(ratio * advantage, clipped * advantage)
            delta = logp[row, t] - ref[row, t]
            row_sum = row_sum - surrogate + kl * (torch.exp(-delta) - 1 + delta)
        total = total + row_sum / length
    return total / (normalizer or len(advantages))


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    B, T = 5, 7
    logp, old, ref = (-2 * torch.rand(3, B, T, generator=generator, dtype=torch.float64)).unbind()
    advantages = torch.randn(B, generator=generator, dtype=torch.float64)
    lengths = [7, 3, 1, 5, 0]
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    return logp.requires_grad_(), old, ref, advantages, lengths, mask


def test_loss_and_gradient_equal_the_formulas(tensors):
    logp, old, ref, advantages, lengths, mask = tensors
    for normalizer in (None, 13):
        loss, stats = grpo.grpo_loss(logp, old, ref, advantages, mask, kl_coef=0.3, normalizer=normalizer)
        expected = reference_loss(logp, old, ref, advantages, lengths, kl=0.3, normalizer=normalizer)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        assert loss.item() == pytest.approx(stats["policy_loss"] + 0.3 * stats["kl"], rel=1e-12)
        assert stats["kl"] >= 0 and 0 < stats["clip_share"] < 1
        torch.testing.assert_close(*(torch.autograd.grad(x, logp)[0] for x in (loss, expected)), rtol=1e-9, atol=1e-12)


def test_loss_passes_a_finite_difference_check(tensors):
    logp, old, ref, advantages, _, mask = tensors
    assert torch.autograd.gradcheck(
        lambda x: grpo.grpo_loss(x, old, ref, advantages, mask, kl_coef=0.3)[0], (logp,), eps=1e-7, atol=1e-6
    )


def test_micro_batches_and_row_order_add_up(tensors):
    logp, old, ref, advantages, _, mask = tensors
    whole, _ = grpo.grpo_loss(logp, old, ref, advantages, mask)
    parts = [[3, 0], [4], [2, 1]]
    pieces = sum(grpo.grpo_loss(logp[p], old[p], ref[p], advantages[p], mask[p], normalizer=5)[0] for p in parts)
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e30])
def test_garbage_at_masked_positions_changes_nothing(tensors, garbage):
    logp, old, ref, advantages, _, mask = tensors
    loss, stats = grpo.grpo_loss(logp, old, ref, advantages, mask)
    (gradient,) = torch.autograd.grad(loss, logp)
    dirty = [torch.where(mask, x.detach(), garbage) for x in (logp, old, ref)]
    dirty[0].requires_grad_()
    dirty_loss, dirty_stats = grpo.grpo_loss(*dirty, advantages, mask)
    (dirty_gradient,) = torch.autograd.grad(dirty_loss, dirty[0])
    assert torch.equal(loss, dirty_loss) and stats == dirty_stats and torch.equal(gradient, dirty_gradient)


def test_first_update_is_reinforce_and_kl_needs_no_reference_when_off(tensors):
    logp, _, _, advantages, lengths, mask = tensors
    loss, stats = grpo.grpo_loss(logp, logp.detach(), None, advantages, mask, kl_coef=0)
    (gradient,) = torch.autograd.grad(loss, logp)
    weights = mask / torch.tensor(lengths).clamp(min=1)[:, None] / 5
    torch.testing.assert_close(gradient, -advantages[:, None] * weights)
    assert stats["clip_share"] == 0


def test_variants_of_the_loss(tensors):
    logp, old, ref, advantages, lengths, mask = tensors
    ratio = torch.exp(logp - old)
    for high in (0.2, 0.5):
        per_token = -torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1 + high) * advantages[:, None])
        sums_B = (per_token * mask).sum(1)
        variants = {  # DAPO: every token counts the same; Dr. GRPO: a constant in place of the row's length
            "grpo": (sums_B / mask.sum(1).clamp(min=1)).sum() / 5,
            "dapo": sums_B.sum() / sum(lengths),
            "dr_grpo": sums_B.sum() / 64 / 5,
        }
        for variant, expected in variants.items():
            weights = grpo.token_weights(mask, variant, 5, sum(lengths), 64)
            loss, _ = grpo.grpo_loss(logp, old, ref, advantages, mask, kl_coef=0, clip_high=high, weights_BT=weights)
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


def test_group_advantages():
    rewards_PG = torch.tensor([[3.0, 1.0, -1.0], [0.1, 0.1, 0.1], [2.0, 2.0, -3.0]])
    advantages_PG = grpo.group_advantages(rewards_PG)
    torch.testing.assert_close(advantages_PG[0], torch.tensor([1.0, 0.0, -1.0]))  # unbiased std = 2
    assert (advantages_PG[1] == 0).all()
    torch.testing.assert_close(advantages_PG[2], (rewards_PG[2] - 1 / 3) / rewards_PG[2].std(unbiased=True))
    assert (grpo.group_advantages(torch.tensor([[5.0], [1.0]])) == 0).all()
    assert grpo.group_advantages(rewards_PG.double()).dtype == torch.float64


def test_superior_cot_mask():
    reasoning_PG = torch.tensor([[-2.0, 0.5], [-2.0, -2.0], [0.5, 0.5], [2.0, -2.0]])
    direct_PH = torch.tensor([[2.0, 0.5], [2.0, 0.5], [2.0, 2.0], [2.0, 2.0]])
    assert grpo.superior_cot_mask(reasoning_PG, direct_PH).tolist() == [True, False, False, True]
    assert grpo.superior_cot_mask(reasoning_PG, torch.zeros(4, 0)).all()


# ---------------------------------------------------------------- the reward path, through the trainer's own functions

RECORD = {
    "id": "r1", "source": "test", "task": "instruction", "language": "en", "composition": "and",
    "messages": [{"role": "user", "content": "Name a drink in lower case without commas."}],
    "constraints": [
        {"kind": "code", "id": "change_case:english_lowercase", "kwargs": {}, "text": "Lower case.", "depends_on": [],
         "active": True},
        {"kind": "code", "id": "punctuation:no_comma", "kwargs": {}, "text": "No commas.", "depends_on": [],
         "active": True},
    ],
}
PERFECT = "the drink must be plain and i avoid commas.\n</think>\n<answer>\ngreen tea is a fine drink\n</answer>"
HALF = PERFECT.replace("green tea is", "green tea, is")
NO_FORMAT = "green tea is a fine drink"
NONE = PERFECT.replace("green tea is", "Green Tea, is")


class ScriptedEngine:
    """Answers the reasoning prompts from one list and the direct ones from another."""

    def __init__(self, reasoning, direct):
        self.texts = [reasoning, direct]

    def wake(self):
        pass

    sleep = wake

    def sync(self, model):
        pass

    def generate(self, prompts, *, n, max_tokens, temperature, stop, seeds):
        assert len(prompts) == len(n) == len(seeds) == len(set(seeds))
        texts = iter(self.texts * len(prompts))
        return [[m.Completion([5, 6, 1], text, "stop", [0.0] * 3) for text in next(texts)] for _ in n]


def scored(tiny, reasoning, direct, record=RECORD, **settings):
    cfg = grpo.Config(group=len(reasoning), direct=len(direct), **settings)
    records = grpo.render([dict(record)], m.load_model(str(tiny))[1], cfg)
    lines = judged(grpo.rollout(ScriptedEngine(reasoning, direct), None, records, 0, cfg), cfg)
    return [s for s in lines if s["mode"] == "cot"], [s for s in lines if s["mode"] == "direct"]


def judged(groups, cfg):
    """The sample lines of scored groups: what the trainer writes down of each rollout."""
    grpo.score_groups(groups, None, cfg)
    grpo.assign_advantages(groups, cfg)
    return grpo.sample_lines(groups)


def test_rewards_through_the_real_path(tiny):
    direct_texts = ["<answer>\ngreen tea\n</answer>", "Green, Tea"]
    reasoning, direct = scored(tiny, [PERFECT, HALF, NO_FORMAT, NONE], direct_texts)
    assert [s["reward"] for s in reasoning] == [3.0, 1.5, -3.0, -1.0]
    assert [s["verdicts"] for s in reasoning[:2]] == [[True, True], [True, False]]
    assert [s["reward"] for s in direct] == [2.0, -2.0]  # scored by the answer; no format part
    advantages = grpo.group_advantages(torch.tensor([[3.0, 1.5, -3.0, -1.0]], dtype=torch.float64))[0].tolist()
    assert [s["advantage"] for s in reasoning] == pytest.approx(advantages)  # direct rollouts are not in the group
    assert all(s["kept"] for s in reasoning) and not any(s["kept"] for s in direct)


def test_the_rule_fires_and_can_be_switched_off(tiny):
    worse, better = [HALF, NO_FORMAT], ["<answer>\ngreen tea\n</answer>", "plain text"]
    reasoning, _ = scored(tiny, worse, better)
    assert not any(s["kept"] for s in reasoning)
    assert grpo.rollout_metrics(sum(scored(tiny, worse, better), []))["rollout/skip_rate"] == 1.0
    reasoning, _ = scored(tiny, worse, better, superior_cot=False)
    assert all(s["kept"] for s in reasoning)
    reasoning, _ = scored(tiny, [HALF, PERFECT], better)
    assert all(s["kept"] for s in reasoning)


def test_the_rule_compares_accuracy_alone(tiny):
    """One of three constraints with the format's +1 is still worse than two of three without it."""
    third = {"kind": "code", "id": "keywords:existence", "kwargs": {"keywords": ["milk"]}, "text": "Milk.",
             "depends_on": [], "active": True}
    record = RECORD | {"constraints": [*RECORD["constraints"], third]}
    reasoning, direct = scored(tiny, [HALF, HALF], ["green tea", "plain tea"], record)
    assert [s["accuracy"] for s in reasoning + direct] == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3])
    assert all(s["reward"] > d["reward"] for s, d in zip(reasoning, direct, strict=True))
    assert {s["why"] for s in reasoning} == {"worse than direct"}


def test_groups_of_equal_rewards_are_left_out_only_if_asked(tiny):
    for drop, why in ((False, ""), (True, "zero variance")):
        reasoning, direct = scored(tiny, [HALF, HALF], ["Green, Tea"], drop_zero_variance=drop)
        assert {s["why"] for s in reasoning} == {why} and all(s["kept"] is not drop for s in reasoning)
        assert grpo.rollout_metrics(reasoning + direct)["rollout/skip_rate"] == 0  # that is the rule's alone
    reasoning, _ = scored(tiny, [HALF, PERFECT], ["Green, Tea"], drop_zero_variance=True)
    assert all(s["kept"] for s in reasoning)


def test_a_rollout_that_hits_the_limit_is_flagged_and_each_step_has_seeds_of_its_own(tiny):
    class Cut(ScriptedEngine):
        seen = []

        def generate(self, prompts, *, seeds, **settings):
            self.seen.append(seeds)
            groups = super().generate(prompts, seeds=seeds, **settings)
            return [[m.Completion(c.token_ids, c.text, "length", c.logprobs) for c in group] for group in groups]

    cfg = grpo.Config(group=2, direct=1)
    records = grpo.render([dict(RECORD)], m.load_model(str(tiny))[1], cfg)
    groups = grpo.rollout(Cut([PERFECT, HALF], ["tea"]), None, records, 0, cfg)
    grpo.rollout(Cut([PERFECT, HALF], ["tea"]), None, records, 1, cfg)
    assert not set(Cut.seen[0]) & set(Cut.seen[1])
    samples = judged(groups, cfg)
    assert all("truncated" in s["guards"] for s in samples)
    assert grpo.rollout_metrics(samples)["rollout/truncated"] == 1.0


def test_cloning_is_the_mean_of_row_means_times_lambda(tiny):
    """Eq. 8 by hand: two experts of different lengths, the model's own logits."""
    policy, _ = m.load_model(str(tiny))
    rows = [m.Sequence([5, 9, 3, 7, 11], 2), m.Sequence([4, 6, 10, 12], 3)]
    means = []
    for row in rows:
        logp_TV = policy(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        means.append(-torch.stack([logp_TV[t - 1, row.ids[t]] for t in range(row.start, len(row.ids))]).mean())
    expected = sum(means) / 2
    (0.25 * expected).backward()
    by_hand = torch.cat([p.grad.flatten() for p in policy.parameters()])
    policy.zero_grad()
    totals = grpo.cloning_backward(policy, rows, grpo.Config(bc_coef=0.25, bc_batch=2), torch.float32)
    assert totals["bc_loss"] == pytest.approx(expected.item(), rel=1e-5)
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
    torch.testing.assert_close(gradient, by_hand, rtol=1e-4, atol=1e-7)


def test_variants_of_reward_and_advantage(tiny):
    texts = [PERFECT, HALF, NO_FORMAT]
    for flags, rewards, advantages in [
        (dict(advantage="none"), [3.0, 1.5, -3.0], [3.0, 1.5, -3.0]),
        (dict(advantage="mean_only"), [3.0, 1.5, -3.0], [2.5, 1.0, -3.5]),
        (dict(advantage="none", reward="fraction"), [2.0, 1.5, -1.0], [2.0, 1.5, -1.0]),
        (dict(advantage="none", reward="all"), [2.0, 1.0, -1.0], [2.0, 1.0, -1.0]),
    ]:
        reasoning, direct = scored(tiny, texts, ["Green, Tea"], superior_cot=False, **flags)
        assert [s["reward"] for s in reasoning] == rewards
        assert [s["advantage"] for s in reasoning] == pytest.approx(advantages)
        metrics = grpo.rollout_metrics(reasoning + direct)
        assert metrics["reward/all_met"] == pytest.approx(1 / 3) and metrics["reward/all_met_direct"] == 0


def test_code_only_switches_judge_constraints_off_and_looks_through_them(tiny):
    """A constraint that depends on a judged one is left with what the judged one depends on."""
    judged = {"kind": "judge", "question": "Is it?", "text": "Be nice.", "depends_on": [0], "active": True}
    first, second = RECORD["constraints"]
    record = {**RECORD, "constraints": [first, judged, {**second, "depends_on": [1]}]}
    alone = {**RECORD, "id": "r2", "constraints": [judged | {"depends_on": []}]}
    [usable] = grpo.deactivate_judge_constraints(copy.deepcopy([record, alone]))
    assert usable["id"] == "r1" and record["constraints"][1]["active"]
    reasoning, _ = scored(tiny, [PERFECT, HALF, NONE, PERFECT.replace("green", "Green")], ["green tea"], usable)
    assert [s["verdicts"] for s in reasoning] == [[True, True], [True, False], [False, False], [False, False]]
    assert [c["text"] for c in reasoning[0]["constraints"]] == [first["text"], second["text"]]


def test_math_takes_all_rollouts_with_reasoning_and_is_never_skipped(tiny):
    record = math_records(1)[0]
    cfg = grpo.Config(group=2, direct=1)
    records = grpo.render([record], m.load_model(str(tiny))[1], cfg)
    engine = ScriptedEngine(["x\n</think>\n<answer>\n\\boxed{1}\n</answer>", "\\boxed{7}", "no box"], [])
    samples = judged(grpo.rollout(engine, None, records, 0, cfg), cfg)
    assert [s["reward"] for s in samples] == [3.0, -2.5, -3.0]
    assert all(s["mode"] == "cot" and s["kept"] for s in samples)


def test_a_rule_that_could_never_fire_is_refused(tiny, tmp_path):
    data = write_records(tmp_path / "d.jsonl", make_records(4))
    result = run_stage("grpo.py", "--model", tiny, "--records", data, "--direct", 0, "--out", tmp_path / "r",
                       check=False)
    assert result.returncode == 2 and "could never fire" in result.stderr


# ---------------------------------------------------------------- data order


def test_prompts_of_a_step_are_a_function_of_seed_and_step():
    pools = {"instruction": make_records(12), "math": math_records(3)}
    cfg = grpo.Config(prompts=4, math_ratio=1 / 3)
    steps = [grpo.prompts_of_step(pools, step, cfg) for step in range(30)]
    assert all(len(records) == 4 for records in steps)
    n_math = sum(record["task"] == "math" for records in steps for record in records)
    assert n_math == 30  # a quarter of 120
    order = [r["id"] for records in steps for r in records if r["task"] == "instruction"]
    for turn in range(7):  # each pass sees every record once
        assert len(set(order[12 * turn : 12 * turn + 12])) == 12
    assert order[:12] != order[12:24]
    assert steps[7] == grpo.prompts_of_step(pools, 7, cfg)


def test_data_may_be_one_kind_alone():
    pools = {"instruction": make_records(8), "math": math_records(4)}
    for data, task in (("complex", "instruction"), ("math", "math")):
        chosen = [r for step in range(3) for r in grpo.prompts_of_step(pools, step, grpo.Config(data=data))]
        assert len(chosen) == 12 and {r["task"] for r in chosen} == {task}


def test_a_record_comes_once_a_step():
    """Its seeds would be the same, and so its rollouts: two groups in one, counted once and trained on twice."""
    pools = {"instruction": make_records(3), "math": []}
    chosen = grpo.prompts_of_step(pools, 0, grpo.Config(data="complex"))
    assert sorted(record["id"] for record in chosen) == ["toy-0000", "toy-0001", "toy-0002"]


def test_judged_records_need_a_judge(tiny, tmp_path):
    records = make_records(3)
    records[1]["constraints"].append({"kind": "judge", "question": "Is it polite?"})
    path, tokenizer = write_records(tmp_path / "d.jsonl", records), m.load_model(str(tiny))[1]
    cfg = dict(records=str(path), math_ratio=0, bc_coef=0)
    with pytest.raises(InputError, match="give --judge NAME"):
        grpo.load_pools(grpo.Config(**cfg), tokenizer)
    assert len(grpo.load_pools(grpo.Config(**cfg, judge="some"), tokenizer)["instruction"]) == 3
    assert len(grpo.load_pools(grpo.Config(**cfg, code_only=True), tokenizer)["instruction"]) == 3


def test_experts_come_from_train_jsonl_next_to_the_prompts_or_from_where_the_flag_says(tiny, tmp_path):
    tokenizer = m.load_model(str(tiny))[1]
    prompts = write_records(tmp_path / "rl.jsonl", make_records(6, expert=False))
    with pytest.raises(InputError, match="rl.jsonl: --bc-coef 1.0 but no record has the field 'expert'"):
        grpo.load_pools(grpo.Config(records=str(prompts), math_ratio=0), tokenizer)
    write_records(tmp_path / "train.jsonl", make_records(4, seed=1))
    other = write_records(tmp_path / "other.jsonl", make_records(3, seed=2))
    pools = grpo.load_pools(grpo.Config(records=str(prompts), math_ratio=0), tokenizer)
    assert len(pools["instruction"]) == 6 and len(pools["expert"]) == 4
    pools = grpo.load_pools(grpo.Config(records=str(prompts), experts=str(other), math_ratio=0), tokenizer)
    assert len(pools["expert"]) == 3


def test_missing_pools_are_named(tiny, tmp_path):
    tokenizer = m.load_model(str(tiny))[1]
    path = write_records(tmp_path / "d.jsonl", make_records(4, expert=False))
    with pytest.raises(InputError, match="--math-ratio 0"):
        grpo.load_pools(grpo.Config(records=str(path)), tokenizer)
    with pytest.raises(InputError, match="--bc-coef 0"):
        grpo.load_pools(grpo.Config(records=str(path), math_ratio=0), tokenizer)
    with pytest.raises(InputError, match="no instruction record"):
        grpo.load_pools(grpo.Config(records=str(write_records(tmp_path / "e.jsonl", math_records(3)))), tokenizer)


# ---------------------------------------------------------------- the same gradient at any layout

GRADIENT_SCRIPT = """
import random, sys, torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import grpo, model as m
from conftest import build_model, double

def gradient(dtype, micro_tokens, sharded=False):
    policy, reference = build_model(64, seed=0), build_model(64, seed=1).requires_grad_(False)
    if dtype == torch.float64:
        policy, reference = double(policy), double(reference)
    if sharded:
        m.shard_model(policy, dtype), m.shard_model(reference, dtype)
    rng = random.Random(0)
    rows = []  # the stored rollouts
    for i in range(12):
        prompt = [i // 4, 7, 9, i // 4][: 2 + i // 4]
        response = [rng.randrange(64) for _ in range(rng.randrange(3, 25))]
        rows.append(m.Sequence(prompt + response, len(prompt), rng.uniform(-2, 2)))
    cfg = grpo.Config(kl_coef=0.1, micro_tokens=micro_tokens, bc_batch=5)
    # rows with and without stored log-probabilities come from different updates
    updates = [grpo.Update(part[rank::world], len(part), 0) for part in (rows[::2], rows[1::2])]
    grpo.store_old_logprobs(reference, updates[:1], cfg, dtype)
    for update in updates:
        grpo.policy_backward(policy, reference, update, cfg, dtype)
    grpo.cloning_backward(policy, rows[rank:5:world], cfg, dtype)
    if sharded:
        return torch.cat([p.grad.full_tensor().flatten() for p in policy.parameters()])
    for p in policy.parameters():
        if world > 1:
            torch.distributed.all_reduce(p.grad)
    return torch.cat([p.grad.flatten() for p in policy.parameters()])

rank, world = m.init_distributed()
gradients = {{(dtype, size, sharded): gradient(getattr(torch, dtype), size, sharded)
             for dtype in ("float64", "float32") for size in (10_000, 40) for sharded in (False, True)[:world]}}
if rank == 0:
    torch.save(gradients, sys.argv[1])
"""


def test_one_gradient_for_any_split_and_number_of_ranks(tmp_path):
    script = tmp_path / "gradient.py"
    script.write_text(GRADIENT_SCRIPT.format(root=str(ROOT)))
    run_stage(script, tmp_path / "one")
    run_stage(script, tmp_path / "two", processes=2)
    one, two = torch.load(tmp_path / "one"), torch.load(tmp_path / "two")
    for dtype, tolerance in [("float64", 1e-9), ("float32", 1e-5)]:
        expected = one[dtype, 10_000, False]
        others = [one[dtype, 40, False]] + [two[dtype, size, shard] for size in (10_000, 40) for shard in (False, True)]
        for other in others:
            assert (other - expected).norm() <= tolerance * expected.norm()


FAST = ["--prompts", 2, "--group", 3, "--direct", 2, "--max-new-tokens", 12, "--bc-batch", 2, "--precision", "fp32",
        "--lr", 1e-3]


@pytest.fixture(scope="module")
def toy_data(tmp_path_factory):
    records = make_records(30) + math_records(6)
    return write_records(tmp_path_factory.mktemp("toy") / "train.jsonl", records)


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def test_two_processes_take_the_same_steps_as_one(tiny, toy_data, tmp_path):
    flags = ["--model", tiny, "--records", toy_data, "--steps", 2, "--updates", 2, *FAST]
    run_stage("grpo.py", *flags, "--out", tmp_path / "one")
    run_stage("grpo.py", *flags, "--out", tmp_path / "two", processes=2)
    one, two = (m.read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for key in ("reward/mean", "rollout/tokens", "rollout/direct"):
            assert a[key] == b[key]
        for name in ("policy", "kl", "bc", "grad_norm", "grad_norm_policy", "grad_norm_bc"):
            key = f"loss/{name}"
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=2e-5)
    names = [[json.loads(line)["id"] for line in open(tmp_path / n / "samples" / "step-000001.jsonl")]
             for n in ("one", "two")]
    assert sorted(names[0]) == sorted(names[1])


def test_a_second_update_is_off_policy_at_the_sampling_temperature(tiny, toy_data, tmp_path):
    flags = ["--model", tiny, "--records", toy_data, "--steps", 1, *FAST, "--temperature", 0.7, "--max-new-tokens", 24]
    flags += ["--updates", 3, "--lr", 0.05, "--warmup", 0.0, "--lr-horizon", 4, "--advantage", "none"]
    run_stage("grpo.py", *flags, "--out", tmp_path / "run")
    [row] = m.read_jsonl(tmp_path / "run" / "metrics.jsonl")
    # The policy has moved after the first update: ratios to the stored log-probabilities leave the clip range.
    assert row["loss/clip_share"] > 0
    assert row["rollout/engine_gap_max"] < 1e-3  # the trainer's log-probabilities are those of the sampling temperature
    # Every update clones other experts: together with the rollouts they are the tokens that were trained on.
    cfg = grpo.Config(model=str(tiny), records=str(toy_data), prompts=2, bc_batch=2)
    pools = grpo.load_pools(cfg, m.load_model(str(tiny))[1])
    prompts = {record["id"]: len(record["prompts"]["cot"].ids) for record in pools["instruction"] + pools["math"]}
    samples = m.read_jsonl(tmp_path / "run" / "samples" / "step-000001.jsonl")
    rollouts = sum(prompts[s["id"]] + s["tokens"] for s in samples if s["kept"])
    experts = [expert for number in range(3) for expert in grpo.experts_of_update(pools, number, cfg)]
    assert len({tuple(expert.ids) for expert in experts}) == 6
    assert row["loss/tokens"] == rollouts + sum(len(expert.ids) for expert in experts)
    # Of update 2, the third: the schedule counts updates, not steps.
    assert row["loss/lr"] == pytest.approx(0.05 * m.warmup_cosine(2, 4, 0.0, 0.1))


def test_a_sharded_run_takes_the_same_steps_and_resumes_on_another_number_of_ranks(tiny, toy_data, tmp_path):
    flags = ["--model", tiny, "--records", toy_data, "--steps", 3, "--save-every", 2, *FAST]
    run_stage("grpo.py", *flags, "--out", tmp_path / "one")
    run_stage("grpo.py", *flags, "--shard", "--activation-checkpointing", "--out", tmp_path / "two", processes=2)
    one, two = (m.read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["rollout/tokens"] == b["rollout/tokens"]
        for key in ("loss/policy", "loss/kl", "loss/bc", "loss/grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=2e-5)
    m.load_model(str(tmp_path / "two" / "model"))
    # go on from two sharded ranks with one that is not sharded: steps 4 and 5 are those of the uninterrupted run
    flags[5] = 5
    for out in ("two", "one"):
        run_stage("grpo.py", *flags, "--lr-horizon", 6, "--out", tmp_path / out, "--resume", "--force", "--no-shard")
    expected, got = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(expected[name], got[name], atol=1e-4) for name in expected)


def test_sft_sharded_equals_one_process(tiny, toy_data, tmp_path):
    flags = ["--model", tiny, "--records", toy_data, "--epochs", 1, "--batch-size", 4, "--precision", "fp32"]
    run_stage("sft.py", *flags, "--out", tmp_path / "one")
    run_stage("sft.py", *flags, "--shard", "--out", tmp_path / "two", processes=2)
    one, two = (m.read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["loss/train"] == pytest.approx(b["loss/train"], rel=1e-4)
        assert a["loss/grad_norm"] == pytest.approx(b["loss/grad_norm"], rel=1e-3)
    assert one[-1]["loss/val"] == pytest.approx(two[-1]["loss/val"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["grpo", "sft"])
def test_twenty_kills_at_random_moments_change_nothing(stage, tiny, toy_data, tmp_path):
    """Also inside a checkpoint write: every step saves one. A run is killed and resumed until it gets to its end."""
    flags = (["--steps", 60, "--save-every", 1, *FAST] if stage == "grpo" else
             ["--epochs", 12, "--batch-size", 4, "--save-every", 1, "--precision", "fp32"])
    command = [f"{stage}.py", "--model", tiny, "--records", toy_data, *flags]
    began = time.time()
    run_stage(*command, "--out", tmp_path / "straight")
    whole, expected = time.time() - began, weights(tmp_path / "straight")
    rng, kills, runs = random.Random(0), 0, 0
    while kills < 20:
        out, code = tmp_path / f"killed-{runs}", None
        while code != 0:
            resume = ["--resume"] if list((out / "checkpoint").glob("step-*.pt")) else []
            process = subprocess.Popen([sys.executable, *map(str, command), "--out", str(out), *resume], cwd=ROOT,
                                       stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
            try:
                code = process.wait(rng.uniform(0.4, 1.0) * whole)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
                kills += 1
        got, runs = weights(out), runs + 1
        assert all(torch.equal(expected[name], got[name]) for name in expected)
    print(f"{kills} kills in {runs} runs")


@pytest.mark.parametrize("stage", ["grpo", "sft"])
def test_killed_and_resumed_equals_uninterrupted(stage, tiny, toy_data, tmp_path):
    if stage == "grpo":
        flags = ["--steps", 8, "--save-every", 2, *FAST]
    else:
        flags = ["--epochs", 4, "--batch-size", 4, "--save-every", 2, "--precision", "fp32"]
    command = [f"{stage}.py", "--model", tiny, "--records", toy_data, *flags]
    run_stage(*command, "--out", tmp_path / "straight")
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, *map(str, command), "--out", str(killed)], cwd=ROOT, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while len(m.read_jsonl(killed / "metrics.jsonl")) < 5:  # past a checkpoint, between two
        time.sleep(0.005)
        assert process.poll() is None, "finished before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Resumed by --out alone: everything else is in config.json; another seed would be another run.
    refused = run_stage(command[0], "--out", killed, "--resume", "--seed", 5, check=False)
    assert refused.returncode == 2 and "--seed 5 would change the course" in refused.stderr
    resumed = run_stage(command[0], "--out", killed, "--resume", "--keep", 2)
    assert "--keep is now 2, was 1" in resumed.stderr
    expected, got = weights(tmp_path / "straight"), weights(killed)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    steps = [row["step"] for row in m.read_jsonl(killed / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))


def test_a_run_without_any_difference_in_reward_says_so(tiny, toy_data, tmp_path):
    """The random model never finds the format: every group is flat."""
    flags = ["--model", tiny, "--records", toy_data, "--steps", 10, *FAST, "--keep", 2, "--save-every", 4]
    result = run_stage("grpo.py", *flags, "--out", tmp_path / "run")
    assert "nothing is learned" in result.stdout and "plan for each of 1 process" in result.stderr
    assert [f.name for f in sorted((tmp_path / "run" / "checkpoint").iterdir())] == ["step-000008.pt", "step-000010.pt"]
    m.load_model(str(tmp_path / "run" / "best"))


def test_sigterm_saves_before_it_stops(tiny, toy_data, tmp_path):
    command = [sys.executable, "grpo.py", "--model", str(tiny), "--records", str(toy_data), "--steps", "500",
               "--save-every", "1000", *map(str, FAST), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not m.read_jsonl(tmp_path / "run" / "metrics.jsonl"):
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume continues" in errors
    assert last_step(tmp_path / "run") == len(m.read_jsonl(tmp_path / "run" / "metrics.jsonl"))


# ---------------------------------------------------------------- it learns

NOUNS = ["tea", "rain", "bread", "snow", "music", "trees", "boats", "soup", "birds", "stone", "night", "fire"]


def toy_task(nouns, count, seed, broken=0.0):
    """One of three constraints a prompt; a share of the demonstrations breaks it, so that RL has something to raise."""
    rng = random.Random(seed)
    records = []
    for i in range(count):
        noun, other = rng.choice(nouns), rng.choice(["good", "old", "warm", "new"])
        rule = rng.choice(["lower", "comma", "word"])
        kind, kwargs, text = {
            "lower": ("change_case:english_lowercase", {}, "Use lower case."),
            "comma": ("punctuation:no_comma", {}, "Use no comma."),
            "word": ("keywords:existence", {"keywords": [other]}, f"Use the word {other}."),
        }[rule]
        good = rng.random() >= broken
        sentence = f"I like {noun}, it is {other if rule == 'word' and good else 'here'}."
        sentence = sentence.lower() if rule == "lower" and good else sentence
        sentence = sentence.replace(",", " and") if rule == "comma" and good else sentence
        records.append({
            "id": f"toy-{seed}-{i}", "source": "toy", "task": "instruction", "language": "en", "composition": "and",
            "messages": [{"role": "user", "content": f"Write about {noun}. {text}"}],
            "constraints": [{"kind": "code", "id": kind, "kwargs": kwargs, "text": text, "depends_on": [],
                             "active": True}],
            "expert": f"<think>\nthe rule: {text}\n</think>\n<answer>\n{sentence}\n</answer>",
        })
    return records


def all_met(folder, records):
    model, tokenizer = m.load_model(str(folder))
    cfg = grpo.Config(group=2, direct=0, max_new_tokens=64, superior_cot=False)
    records = grpo.render(records, tokenizer, cfg)
    lines = judged(grpo.rollout(m.make_engine("hf", model, tokenizer), model, records, 0, cfg), cfg)
    return sum(line["accuracy"] == 2 for line in lines) / len(lines)


def test_reinforcement_learning_raises_the_reward(tmp_path):
    train = toy_task(NOUNS, 400, seed=0, broken=0.5)
    data = write_records(tmp_path / "train.jsonl", train)
    texts = [r["messages"][0]["content"] + r["expert"] for r in train]
    prompt_text = (m.data_dir / "prompts" / "cot.en.txt").read_text()
    tokenizer = build_tokenizer([*texts, *[prompt_text] * 40])
    build_model(len(tokenizer), hidden=128).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    threads = {"OMP_NUM_THREADS": "2"}
    run_stage("sft.py", "--model", tmp_path / "base", "--records", data, "--epochs", 8, "--batch-size", 16,
              "--lr", 2e-3, "--precision", "fp32", "--out", tmp_path / "sft", **threads)
    run_stage("grpo.py", "--model", tmp_path / "sft/model", "--records", data, "--steps", 40, "--prompts", 8,
              "--group", 8, "--direct", 0, "--no-superior-cot", "--bc-coef", 0, "--math-ratio", 0, "--lr", 5e-4,
              "--max-new-tokens", 64, "--precision", "fp32", "--save-every", 100, "--out", tmp_path / "rl", **threads)
    heldout = toy_task(NOUNS, 96, seed=1)
    before, after = all_met(tmp_path / "sft/model", heldout), all_met(tmp_path / "rl/model", heldout)
    assert after > before + 0.1, (before, after)
    assert math.isfinite(m.read_jsonl(tmp_path / "rl" / "metrics.jsonl")[-1]["loss/kl"])
