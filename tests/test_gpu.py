"""On a GPU machine: pytest -m gpu. The tiny model on CUDA does what it does on the CPU; vllm too where installed."""

import pytest
import torch
from conftest import make_records, math_records, run_stage, write_records

import model as m

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROWS = [([5, 9, 3, 7, 11], 3), ([5, 9, 3, 8], 3), ([4, 6, 10, 12, 9], 2)]


def test_logprobs_and_gradient_are_those_of_the_cpu(tiny):
    from transformers import AutoModelForCausalLM

    on_gpu, _ = m.load_model(str(tiny))
    on_cpu = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    logp_BR, _ = m.row_logprobs(on_gpu, [[row] for row in ROWS])
    width = max(len(ids) for ids, _ in ROWS)
    ids_BT = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in ROWS])
    mask_BT = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in ROWS])
    expected_BR = m.token_logprobs(on_cpu, ids_BT, mask_BT, torch.tensor([start for _, start in ROWS]))
    torch.testing.assert_close(logp_BR.cpu(), expected_BR, rtol=1e-3, atol=1e-3)
    logp_BR.sum().backward()
    expected_BR.sum().backward()
    for a, b in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
        assert torch.cosine_similarity(a.grad.cpu().flatten(), b.grad.flatten(), dim=0) > 0.999


def test_rollouts_carry_the_trainers_logprobs(tiny):
    policy, tokenizer = m.load_model(str(tiny))
    engine = m.make_engine("hf", policy, tokenizer, dtype=torch.bfloat16)
    groups = engine.generate([[5, 6, 7], [8, 9]], n=4, max_tokens=12, seeds=[1, 2])
    again = engine.generate([[5, 6, 7], [8, 9]], n=4, max_tokens=12, seeds=[1, 2])
    assert [[c.token_ids for c in group] for group in groups] == [[c.token_ids for c in group] for group in again]
    made = [m.Sequence([5, 6, 7] + c.token_ids, 3, sampled_logp=c.logprobs)
            for c in groups[0]]
    m.store_logprobs(policy, m.micro_batches(made, 1024), torch.bfloat16)
    assert m.engine_gap(made)["rollout/engine_gap"] < 0.05


@pytest.mark.parametrize("flags", [[], ["--shard", "--activation-checkpointing"], ["--shard", "--offload", "all"]])
def test_grpo_runs_under_torchrun(tiny, tmp_path, flags):
    data = write_records(tmp_path / "d.jsonl", make_records(12) + math_records(4))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", torch.cuda.device_count(), "grpo.py",
               "--model", tiny, "--records", data, "--steps", 3, "--max-new-tokens", 16, "--bc-batch", 4, *flags]
    run_stage(*command, "--out", tmp_path / "run")
    assert len(m.read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 3
    m.load_model(str(tmp_path / "run" / "model"))


def test_grpo_runs_on_vllm(tiny, tmp_path):
    pytest.importorskip("vllm")
    data = write_records(tmp_path / "d.jsonl", make_records(12) + math_records(4))
    run_stage("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1, "grpo.py", "--engine", "vllm",
              "--engine-share", 0.2, "--model", tiny, "--records", data, "--steps", 3, "--max-new-tokens", 16,
              "--max-prompt-tokens", 512, "--out", tmp_path / "run")
    assert all(row["rollout/engine_gap"] < 0.1 for row in m.read_jsonl(tmp_path / "run" / "metrics.jsonl"))
