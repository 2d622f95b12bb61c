"""Time LocalJudge against the slow form (both full conversations of every question) on the same items, interleaved.

    python tests/bench/bench_judge.py [--model smollm2-135m] [--items 200] [--questions 5]

Answers are the shipped expert answers, five general questions each. Float32, so that rounding cannot flip a verdict.
The slow form runs prompt + "yes" and prompt + "no" as one batch of two. Chunks of both forms alternate.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import model as m  # noqa: E402
from rewards import parse_response, read_records  # noqa: E402

QUESTIONS = ["Does the reply stay on the topic of the request?", "Is the tone of the reply polite and friendly?",
             "Is the reply free of repetition?", "Does the reply give a concrete detail or example?",
             "Would the person who asked be satisfied with the reply?"]


@torch.inference_mode()
def slow_verdict(judge, item) -> bool:
    prompt = judge._prompt_ids(*item)
    ids_BT, mask_BT = m.pad_right([prompt + reply for reply in judge.replies])
    start_B = torch.tensor([len(prompt)] * 2, device=ids_BT.device)
    yes, no = m.token_logprobs(judge.model, ids_BT, mask_BT, start_B).sum(1).tolist()
    return yes > no


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--questions", type=int, default=5, choices=range(1, 6))
    args = parser.parse_args()
    judge = m.LocalJudge(*m.load_model(args.model))
    records = [r for r in read_records(ROOT / "data" / "teacher.jsonl") if r.get("expert")]
    items = [(r["messages"][-1]["content"], parse_response(r["expert"]).answer, question)
             for r in records for question in QUESTIONS[: args.questions]][: args.items]
    chunk, seconds, differing, yes = 8 * args.questions, {"fast": 0.0, "slow": 0.0}, 0, 0
    judge(items[: args.questions]), slow_verdict(judge, items[0])  # warm-up
    for start in range(0, len(items), chunk):
        part = items[start : start + chunk]
        began = time.perf_counter()
        fast = judge(part)
        middle = time.perf_counter()
        slow = [slow_verdict(judge, item) for item in part]
        seconds["fast"] += middle - began
        seconds["slow"] += time.perf_counter() - middle
        differing += sum(a != b for a, b in zip(fast, slow, strict=True))
        yes += sum(fast)
    print(f"{len(items)} items, {args.questions} questions an answer, {yes} judged yes: {differing} verdicts differ; "
          f"LocalJudge {seconds['fast']:.1f} s, two full conversations {seconds['slow']:.1f} s, "
          f"ratio {seconds['slow'] / seconds['fast']:.2f}")


if __name__ == "__main__":
    main()
