"""Chance on the held-out records: how often answers that were never asked for the constraints meet them all.

    python tests/bench/bench_chance.py            per type; 15 minutes on two cores in float32 for the answers, once
    python tests/bench/bench_chance.py --write    the share of each record as its field `chance` in data/heldout.jsonl

Twenty answers of the untrained default model (temperature 0.7, seed 0) per record: ten to its own request without the
constraints, ten to other requests of the file, cut behind 40, 80 and 160 words at the end of a sentence where there is
one. Rows above 0.1 were reworded before the file was frozen (data/SHA256SUMS).
"""

import argparse
import random
import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import model as m
import rewards

ANSWERS = Path("runs/chance/answers.jsonl")
WORDS = (40, 80, 160)


def plain_answers(requests: dict[str, str]) -> dict[str, list[str]]:
    """Four sampled answers to each plain request, by seed id; those of an earlier call are read again."""
    stored = {row["seed"]: row["answers"] for row in m.read_jsonl(ANSWERS)}
    missing = sorted(requests.keys() - stored.keys())
    if missing:
        m.keep_freed_memory()
        dtype = m.compute_dtype("auto")
        model, tokenizer = m.load_model(m.DEFAULT_MODEL, dtype=dtype)
        engine = m.make_engine("hf", model, tokenizer, dtype=dtype)
        prompts = [m.render_prompt(tokenizer, [{"role": "user", "content": requests[i]}], "io").ids for i in missing]
        groups = engine.generate(prompts, n=4, max_tokens=220, temperature=0.7, progress="plain answers",
                                 seeds=[m.record_seed(0, 0, i) for i in missing])
        stored |= {i: [c.text for c in group] for i, group in zip(missing, groups, strict=True)}
        m.write_jsonl(ANSWERS, [{"seed": i, "answers": stored[i]} for i in sorted(stored)])
    return stored


def cut(text: str, words: int) -> str:
    """The first `words` words, up to the last end of a sentence in their second half."""
    ends = [found.end() for found in re.finditer(r"\S+", text)]
    head = text[: ends[words - 1]] if len(ends) >= words else text
    stops = [found.end() for found in re.finditer(r"[.!?](?=\s|$)", head) if found.end() > len(head) / 2]
    return head[: stops[-1]] if stops and len(ends) > words else head


def chance_of(record: dict, answers: dict[str, list[str]]) -> float:
    """Share of 20 answers to other questions that meet all constraints of the record."""
    rng = random.Random(record["id"])
    own = [cut(text, words) for text in answers[record["seed"]] for words in WORDS][:10]
    others = rng.sample(sorted(answers.keys() - {record["seed"]}), 10)
    foreign = [cut(rng.choice(answers[seed]), WORDS[k % 3]) for k, seed in enumerate(others)]
    checks = [(c["id"], c["kwargs"]) for c in record["constraints"]]
    return sum(all(rewards.check(*c, text) for c in checks) for text in own + foreign) / 20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", default=str(m.data_dir / "heldout.jsonl"))
    parser.add_argument("--write", action="store_true", help="store the shares in the record file")
    args = parser.parse_args()
    records = rewards.read_records(args.records)
    answers = plain_answers({record["seed"]: record["request"] for record in records})
    shares, alone = defaultdict(list), defaultdict(list)
    for record in records:
        record["chance"] = chance_of(record, answers)
        for c in record["constraints"]:
            shares[c["id"]].append(record["chance"])
            if len(record["constraints"]) == 1:
                alone[c["id"]].append(record["chance"])
    for split, ood in (("in distribution", False), ("out of distribution", True)):
        part = [record["chance"] for record in records if record["ood"] is ood]
        print(f"{split}: mean {sum(part) / len(part):.3f}, {sum(c > 0.1 for c in part)} of {len(part)} above 0.1")
    rows = []
    for name, part in sorted(shares.items()):
        mean_alone = f"{sum(alone[name]) / len(alone[name]):.3f}" if alone[name] else "-"
        rows.append((name, len(part), f"{sum(part) / len(part):.3f}", f"{max(part):.2f}", len(alone[name]), mean_alone))
    print(m.markdown_table(("type", "records", "mean chance", "highest", "alone", "mean chance alone"), rows))
    for record in records:
        if record["chance"] > 0.1:
            asked = ", ".join(f"{c['id']} {c['kwargs']}" for c in record["constraints"])
            print(f"{record['id']} {record['chance']:.2f} {asked}")
    if args.write:
        m.write_jsonl(args.records, records)


if __name__ == "__main__":
    main()
