"""Rollout and update throughput and peak memory at real model shapes with random weights; how the cost grows.

    python tests/bench/bench_throughput.py --shape qwen2.5-0.5b --prompts 8 --prompt-tokens 256 --tokens 512
    python tests/bench/bench_throughput.py --shape smollm2-135m --growth growth.png

A step is one of grpo.py without scoring and cloning: rollouts by the hf engine (bf16, no early end), reference pass,
backward, AdamW. Share of peak: model FLOPs of the update (8 · parameters · tokens) over those of a matrix product.
--growth times the update against response length and group size and measures the head's memory beside the rest.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import grpo  # noqa: E402
import model as m  # noqa: E402

SHAPES = {  # hidden, MLP, layers, heads, key/value heads, vocabulary
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936),
    "tiny": (64, 128, 2, 4, 2, 512),
}


def build(shape):
    from transformers import AutoModelForCausalLM, Qwen2Config

    hidden, mlp, layers, heads, kv, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = Qwen2Config(hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=kv, vocab_size=vocabulary, tie_word_embeddings=True,
                         max_position_embeddings=32768, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    m._use_group_attention(model)
    return model.to(m.device()).eval()


class NoTokenizer:
    """The engine decodes what it sampled; random weights need no text and never end a turn."""

    eos_token_id = -1

    def decode(self, ids, **_):
        return ""


def wait() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_flops(dtype) -> float:
    size = 8192 if torch.cuda.is_available() else 2048
    matrix, best = torch.randn(size, size, device=m.device(), dtype=dtype), float("inf")
    for _ in range(5):
        began = wait()
        matrix @ matrix
        best = min(best, wait() - began)
    return 2 * size**3 / best


def rows_for(prompts, group, prompt_tokens, tokens):
    generator = torch.Generator().manual_seed(0)

    def draw(n):
        return torch.randint(3, 500, (n,), generator=generator).tolist()

    rows = []
    for _ in range(prompts):
        prompt = draw(prompt_tokens)
        rows += [m.Sequence(prompt + draw(tokens), prompt_tokens, (-1.0) ** i) for i in range(group)]
    return rows


def update(policy, reference, optimizer, rows, cfg, dtype) -> float:
    """Seconds of reference pass, backward and optimizer step."""
    for row in rows:
        row.old_logp = None
    began = wait()
    grpo.policy_backward(policy, reference, grpo.Update(rows, len(rows), 0), cfg, dtype)
    m.optimizer_step(policy, optimizer, {"policy": m.take_gradients(policy)}, 0, [], Path("."))
    return wait() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    for name, default in (("prompts", 4), ("group", 8), ("prompt-tokens", 48), ("tokens", 96), ("repeats", 3),
                          ("micro-tokens", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--growth", default="", help="PNG of time against length and group size")
    args = parser.parse_args()
    if not args.growth:
        m.keep_freed_memory()
    dtype, on_gpu = m.compute_dtype("auto"), torch.cuda.is_available()
    policy, reference = build(args.shape), build(args.shape).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    cfg = grpo.Config(micro_tokens=args.micro_tokens or (16_384 if on_gpu else 1024))
    if args.growth:
        return growth(policy, reference, optimizer, cfg, dtype, args)
    engine = m.Engine(policy, NoTokenizer(), dtype=dtype, max_rows=256 if on_gpu else 64)
    rows = rows_for(args.prompts, args.group, args.prompt_tokens, args.tokens)
    prompts = [row.ids[: row.start] for row in rows[:: args.group]]
    rollouts, updates, count = [], [], sum(p.numel() for p in policy.parameters())
    for _ in range(args.repeats + 1):  # the first is warm-up
        began = wait()
        engine.generate(prompts, n=args.group, max_tokens=args.tokens, seeds=range(args.prompts))
        rollouts.append(wait() - began)
        updates.append(update(policy, reference, optimizer, rows, cfg, dtype))
    sampled = args.prompts * args.group * args.tokens
    trained = sampled + args.prompts * args.prompt_tokens  # a prompt is computed once for its group, if it is packed
    rollout_s, update_s = sorted(rollouts[1:])[args.repeats // 2], sorted(updates[1:])[args.repeats // 2]
    print(json.dumps({
        "shape": args.shape, "prompts": args.prompts, "group": args.group, "prompt_tokens": args.prompt_tokens,
        "tokens": args.tokens, "dtype": str(dtype), "rollout_tokens_per_s": round(sampled / rollout_s),
        "update_tokens_per_s": round(trained / update_s),
        "update_share_of_matrix_peak": round(8 * count * trained / update_s / peak_flops(dtype), 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if on_gpu else None,
    }))


def growth(policy, reference, optimizer, cfg, dtype, args):
    plt = m.pyplot()

    def best(group, tokens):
        rows = rows_for(args.prompts, group, args.prompt_tokens, tokens)
        return min(update(policy, reference, optimizer, rows, cfg, dtype) for _ in range(args.repeats))

    # The head alone: memory of one forward and backward over N positions beyond hidden states and their gradient;
    # measured first, while freed blocks still go back to the system at once.
    head, extra = policy.get_output_embeddings(), []
    positions = [256, 1024, 4096]
    for n in positions:
        hidden_ND = torch.randn(n, policy.config.hidden_size, device=m.device(), requires_grad=True)
        target_N = torch.zeros(n, dtype=torch.long, device=m.device())
        with PeakMemory() as peak:
            m._head_logprobs(head, hidden_ND, target_N, 1.0, 256).sum().backward()
        optimizer.zero_grad(set_to_none=True)
        extra.append((peak.most - hidden_ND.grad.nbytes) / 2**20)
    m.keep_freed_memory()
    lengths, groups = [32, 64, 128, 256, 512], [2, 4, 8, 16]
    by_length, by_group = [best(4, n) for n in lengths], [best(n, 96) for n in groups]
    fig, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    for ax, x, y, title in ((axes[0], lengths, by_length, "update, s; response tokens"),
                            (axes[1], groups, by_group, "update, s; group size"),
                            (axes[2], positions, extra, "head, MiB; positions")):
        ax.plot(x, y, marker="o")
        ax.set(title=title, ylim=(0, None))
    fig.savefig(args.growth, dpi=120)
    print(json.dumps({"shape": args.shape, "update_s_by_length": dict(zip(lengths, by_length, strict=True)),
                      "update_s_by_group": dict(zip(groups, by_group, strict=True)),
                      "head_mib_by_positions": dict(zip(positions, extra, strict=True))}))


class PeakMemory:
    """Bytes taken at most between enter and exit, beyond those before; of the GPU, or of the process (Linux)."""

    def __enter__(self):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
        else:
            m.keep_freed_memory(trim=True)
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
            self.base = self.status("VmRSS")
        return self

    def __exit__(self, *error):
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self.status("VmHWM")
        self.most = peak - self.base

    @staticmethod
    def status(field):
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
        return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
