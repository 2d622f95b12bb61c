"""Records a minute of evolve.py with a server that answers at once, and its seed stage on many requests.

    python tests/bench/bench_evolve.py [--records 300] [--seeds 100000]

The server is the scripted one of tests/test_evolve_llm.py, in this process: its share of the time counts too. The seed
stage (reading, language, length, exact and near duplicates) runs in a process of its own, whose peak memory is printed.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import serving  # noqa: E402
from test_evolve_llm import Scripted, flags  # noqa: E402

import evolve  # noqa: E402


def seed_stage(path: str) -> None:
    began = time.time()
    counts = evolve.Counter()
    cfg = evolve.Config(seeds=path, language="both", llm="any")
    seeds = evolve.drop_duplicates(evolve.read_seeds(cfg, counts), counts)
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"seed stage: {len(seeds)} kept, {time.time() - began:.0f} s, peak {gigabytes:.2f} GiB", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=100_000)
    parser.add_argument("--seed-stage", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.seed_stage:
        return seed_stage(args.seed_stage)
    words = [word for row in evolve.rows_of(str(evolve.data_dir / "seeds.jsonl")) for word in row[1]["text"].split()]
    with tempfile.TemporaryDirectory() as folder:
        with serving(Scripted) as address:
            command = [sys.executable, "evolve.py", *flags(address, Path(folder) / "run", args.records),
                       "--judge-share", "1"]  # the script meets judged constraints of any kind
            began = time.time()
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds = time.time() - began
        made = sum(row["task"] == "instruction" for name in ("train.jsonl", "heldout.jsonl")
                   for _, row in evolve.rows_of(str(Path(folder) / "run" / name)))
        print(f"instant server: {made} records from {args.records} requests, {Scripted.asked} calls, {seconds:.0f} s: "
              f"{60 * made / seconds:.0f} records a minute", flush=True)
        path, rng = Path(folder) / "seeds.jsonl", random.Random(0)
        with open(path, "w", encoding="utf-8") as file:
            for _ in range(args.seeds):
                text = "Tell me how the " + " ".join(rng.choices(words, k=rng.randint(8, 40)))
                file.write(json.dumps({"instruction": text, "input": "", "output": ""}) + "\n")
        subprocess.run([sys.executable, __file__, "--seed-stage", str(path)], check=True)


if __name__ == "__main__":
    main()
