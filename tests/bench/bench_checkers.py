"""Time our checkers against the official IFEval checkers, interleaved, on the published GPT-4 answers.

    pip download --no-deps lm-eval==0.4.13 && unzip -q lm_eval-*.whl 'lm_eval/tasks/ifeval/*' -d ORACLE
    python tests/bench/bench_checkers.py ORACLE [--repeats 3]

Needs the shared benchmark folder (RAIF_SHARED or ../shared) and, for the official code, immutabledict (a stand-in is
used without it). One thread. Both sides get the same texts in turn, with empty caches at the start of each repeat.
"""

import argparse
import gzip
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import types
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import rewards  # noqa: E402

SHARED = Path(os.environ.get("RAIF_SHARED", ROOT.parent / "shared"))


def load_official(folder: str):
    """The registry of the official checkers out of an unpacked lm-eval wheel, without importing the rest of lm-eval."""
    data = Path(tempfile.mkdtemp()) / "tokenizers" / "punkt_tab"
    shutil.copytree(ROOT / "data" / "punkt" / "english", data / "english")  # nltk refuses links out of its folder
    os.environ["NLTK_DATA"] = str(data.parents[1])
    import nltk

    nltk.data.path.insert(0, os.environ["NLTK_DATA"])
    try:
        import immutabledict  # noqa: F401
    except ImportError:
        sys.modules["immutabledict"] = types.SimpleNamespace(immutabledict=dict)
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(folder, *name.split(".")))]
        sys.modules[name] = package
    from langdetect import DetectorFactory
    from lm_eval.tasks.ifeval import instructions_registry

    DetectorFactory.seed = 0
    return instructions_registry.INSTRUCTION_DICT


def official(registry, kind, kwargs, prompt, response, loose):
    checker = registry[kind](kind)
    checker.build_description(**{k: v for k, v in kwargs.items() if v is not None})
    asked = checker.get_instruction_args()
    if asked and "prompt" in asked:
        checker.build_description(prompt=prompt)
    if not loose:
        return bool(response.strip() and checker.check_following(response))
    lines = response.split("\n")
    cuts = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    texts = [text for cut in cuts for text in (cut, cut.replace("*", ""))]
    return any(text.strip() and checker.check_following(text) for text in texts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("oracle", help="folder with the unpacked lm-eval wheel")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    prompts = map(json.loads, (SHARED / "benchmarks/ifeval/input_data.jsonl").read_text("utf-8").splitlines())
    prompts = {row["key"]: row for row in prompts}
    with gzip.open(SHARED / "conformance/ifeval/verdicts_gpt4.jsonl.gz", "rt", encoding="utf-8") as file:
        answers = [json.loads(line) for line in file]
    registry = load_official(args.oracle)
    rewards.check("change_case:english_capital", {}, "LOAD THE TABLES ONCE.", mode="compat")
    official(registry, "change_case:english_capital", {}, "", "LOAD THE TABLES ONCE.", False)
    one = {"num_sentences": 1, "relation": "at least"}
    rewards.check("length_constraints:number_sentences", one, "Yes.", mode="compat")
    official(registry, "length_constraints:number_sentences", one, "", "Yes.", False)

    detect, spent = rewards.detect_language, [0.0]

    def timed_detect(text):
        start = time.perf_counter()
        code = detect(text)
        spent[0] += time.perf_counter() - start
        return code

    timed_detect.cache_clear = detect.cache_clear
    rewards.detect_language = timed_detect
    totals, kinds, different = defaultdict(list), defaultdict(lambda: defaultdict(float)), set()
    for _ in range(args.repeats):
        rewards.text_of.cache_clear()
        detect.cache_clear()
        spent[0], run = 0.0, defaultdict(float)
        for answer in answers:
            prompt, response = prompts[answer["key"]], answer["response"]
            for kind, kwargs in zip(prompt["instruction_id_list"], prompt["kwargs"], strict=True):
                for loose in (False, True):
                    ours = rewards.check_loose if loose else rewards.check
                    start = time.perf_counter()
                    mine = ours(kind, kwargs, response, prompt=prompt["prompt"], mode="compat")
                    middle = time.perf_counter()
                    theirs = official(registry, kind, kwargs, prompt["prompt"], response, loose)
                    end = time.perf_counter()
                    for side, seconds in (("ours", middle - start), ("official", end - middle)):
                        run[side, loose] += seconds
                        kinds[kind][side] += seconds
                    kinds[kind]["calls"] += 1
                    if mine != theirs:
                        different.add((answer["key"], kind))
        for key, seconds in run.items():
            totals[key].append(seconds)
        totals["detect"].append(spent[0])

    median = {key: statistics.median(values) for key, values in totals.items()}
    print(f"{'kind':44}{'ours us':>9}{'official us':>13}{'ratio':>7}   (strict and loose together, per call)")
    for kind, row in sorted(kinds.items(), key=lambda item: -item[1]["ours"]):
        mine, theirs = (row[side] / row["calls"] * 1e6 for side in ("ours", "official"))
        print(f"{kind:44}{mine:9.1f}{theirs:13.1f}{theirs / mine:7.1f}")
    both = [median[side, False] + median[side, True] for side in ("ours", "official")]
    print(f"strict {median['ours', False]:.3f} s, official {median['official', False]:.3f} s, "
          f"{median['official', False] / median['ours', False]:.2f} times faster")
    print(f"strict and loose {both[0]:.3f} s, official {both[1]:.3f} s, {both[1] / both[0]:.2f} times faster")
    print(f"language detection: {median['detect']:.3f} s, {median['detect'] / both[0]:.0%} of our time")
    print(f"different verdicts: {sorted(different) or 'none'} (key 1122: the wheel draws a random letter)")


if __name__ == "__main__":
    main()
