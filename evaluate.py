"""Stage 4: measure models on a record file and write report.md, report.json and PNG plots.

    python evaluate.py                                             rows I/O, CoT, SFT, Ours on the held-out prompts
    python evaluate.py --model runs/grpo/model --label Ours        one row; the report is rebuilt from all rows there
    python evaluate.py --method sdc --benchmarks my_records.jsonl  another inference method, another record file
    python evaluate.py --judge MODEL --judge-agreement FILE        accuracy, precision, recall, kappa of a judge

Decoding is greedy with one token limit for all rows. Thought and tags are removed before scoring; an answer with a
broken format counts as a format failure and is scored on what is left of it. Every share comes with its n and a
percentile-bootstrap interval over prompts; rows are compared prompt by prompt (paired bootstrap). A killed run goes
on where it stopped: the same command again.

Suffixes: N prompts, K columns (statistics of rows, differences), R bootstrap resamples, B sequences, T tokens.
"""

import hashlib
import html
import json
import math
import time
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import rewards
from model import (
    append_jsonl,
    compute_dtype,
    data_dir,
    gather_objects,
    init_distributed,
    launch,
    load_model,
    make_engine,
    make_judge,
    open_run,
    pad_right,
    parse_flags,
    read_jsonl,
    render_prompt,
    token_batches,
    token_logprobs,
    write_atomic,
    write_jsonl,
)
from rewards import InputError

METHODS = {"io": "I/O", "cot": "CoT", "direct": "Direct", "sdc": "SDC"}  # inference method -> default label of its row
ROW_ORDER = ["I/O", "CoT", "SDC", "Direct", "SFT", "Ours"]  # further labels follow in alphabetical order
SPLITS = ["all", "in-distribution", "ood"]


@dataclass
class Config:
    model: str = ""  # evaluate one row: smollm2-135m, a local folder or a hub name (default: the four rows)
    method: str = ""  # how the one row is produced: io, cot, direct or sdc (default: cot)
    label: str = ""  # name of the one row in the tables (default: the name of its method)
    benchmarks: str = ""  # record file (default: runs/evolve/heldout.jsonl, or else the shipped data/heldout.jsonl)
    run: str = "runs/evaluate"  # folder of the report; rows of earlier calls in it stay in the tables
    base_model: str = "smollm2-135m"  # model of the rows I/O and CoT, and the judge of perplexity
    sft_model: str = "runs/sft/model"  # model of the row SFT
    ours_model: str = "runs/grpo/model"  # model of the row Ours
    family: str = "cold"  # answer format: cold (think and answer tags) or warm (think tags only)
    max_new_tokens: int = 160  # token limit of every generated turn, the same for all rows of a report
    judge: str = ""  # model that answers yes/no questions: as for --model, or the name it is served under
    judge_url: str = ""  # OpenAI-compatible server of the judge, e.g. http://localhost:8000/v1 (default: load it here)
    judge_agreement: str = ""  # JSONL of {instruction, answer, question, label: true|false}: measure the judge on it
    limit: int = 0  # evaluate only this many records, spread evenly over the file (0 = all)
    chunk: int = 64  # prompts generated between two writes of the row file; a killed run loses at most these
    resume: bool = True  # reuse the answers a row already has; --no-resume generates them anew
    engine: str = "hf"  # rollout engine: hf or vllm
    precision: str = "auto"  # auto, bf16 or fp32
    perplexity_items: int = 64  # answers per row whose perplexity under the base model is measured (0 = none)
    resamples: int = 10000  # bootstrap resamples
    seed: int = 0  # seed of the bootstrap


# ---------------------------------------------------------------- scoring one answer


def answer_text(text, family="cold"):
    """What is scored of an assistant turn: the answer block, or else the text left after the thought, without tags.

    A thought that never ends counts as no thought: what was written is the answer.
    """
    if "</think>" not in text and "<think>" in text:
        text = text.replace("<think>", "").strip()
    return rewards.parse_response(text, family).answer


def score_item(record, text, family="cold"):
    """{"kinds", "strict", "loose"} of one assistant turn: an entry per active constraint (math: one for the result)."""
    if record["task"] == "math":
        correct = rewards.math_reward(text, record["answer"]) == 2.0
        return {"kinds": ["math"], "strict": [correct], "loose": [correct]}
    answer, prompt = answer_text(text, family), record["messages"][-1]["content"]
    constraints = record["constraints"]

    def verdicts(check):
        held = []  # as in rewards.score: false if anything it depends on is; an inactive constraint is not checked
        for c in constraints:
            passed = not c["active"] or check(c["id"], c["kwargs"], answer, prompt=prompt)
            held.append(passed and all(held[k] for k in c["depends_on"]))
        return [holds for holds, c in zip(held, constraints, strict=True) if c["active"]]

    kinds = [c["id"] for c in constraints if c["active"]]
    return {"kinds": kinds, "strict": verdicts(rewards.check), "loose": verdicts(rewards.check_loose)}


def repetition(tokens):
    """Share of 4-grams of `tokens` that occurred before in it (0 for fewer than four tokens)."""
    grams = list(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@torch.no_grad()
def answer_perplexity(model, tokenizer, records, answers, token_budget=4096):
    """exp(mean negative log-likelihood per token) of the answers after the plain requests; None if all are blank."""
    pairs = []
    for record, answer in zip(records, answers, strict=True):
        prompt = render_prompt(tokenizer, record["messages"], "io", language=record.get("language", "en")).ids
        response = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if response:
            pairs.append((prompt, response))
    total, count = 0.0, 0
    for batch in token_batches([len(prompt) + len(response) for prompt, response in pairs], token_budget):
        ids_BT, mask_BT = pad_right([pairs[i][0] + pairs[i][1] for i in batch])
        start_B = torch.tensor([len(pairs[i][0]) for i in batch], device=ids_BT.device)
        total -= token_logprobs(model, ids_BT, mask_BT, start_B).double().sum().item()
        count += sum(len(pairs[i][1]) for i in batch)
    return math.exp(total / count) if count else None


# ---------------------------------------------------------------- statistics


def bootstrap(values_NK, weights_NK=None, *, resamples=10000, seed=0):
    """Weighted means of the columns and their 95 % percentile-bootstrap limits over rows (prompts).

    Returns (estimate_K, low_K, high_K). The statistic is sum(values) / sum(weights) of a resample, so for a share per
    constraint values are constraints met and weights constraints asked. All columns see the same resamples: the
    difference of two rows of the table, taken per prompt, is one more column, and its interval is the paired one.
    """
    values_NK = np.asarray(values_NK, dtype=np.float64)
    weights_NK = np.ones_like(values_NK) if weights_NK is None else np.asarray(weights_NK, dtype=np.float64)
    n, rng, parts = len(values_NK), np.random.default_rng(seed), []
    for start in range(0, resamples, 1000):  # a thousand at a time bounds the memory
        # How often each prompt is drawn; faster than drawing N prompts for each resample.
        counts_RN = rng.multinomial(n, np.full(n, 1 / n), size=min(1000, resamples - start)).astype(np.float64)
        parts.append((counts_RN @ values_NK) / (counts_RN @ weights_NK))
    low_K, high_K = np.percentile(np.concatenate(parts), [2.5, 97.5], axis=0)
    return values_NK.sum(0) / weights_NK.sum(0), low_K, high_K


def spread(items, n):
    """`n` of the items at even distances (all of them if there are fewer)."""
    return [items[k * len(items) // n] for k in range(n)] if n < len(items) else list(items)


# ---------------------------------------------------------------- how good a judge is


def judge_agreement(judge, path, limit=0):
    """Verdicts of a judge against labels: ({accuracy, precision, recall, kappa, n …}, rows with `verdict` added).

    Positive is yes. An unreadable verdict counts as no, and in `unreadable`. kappa is Cohen's; a rate is None where
    its denominator is 0.
    """
    rows = []
    for number, row in rewards.json_lines(path):
        for field, kind, form in (("instruction", str, "a text"), ("answer", str, "a text"),
                                  ("question", str, "a yes/no question"), ("label", bool, "true or false")):
            if not isinstance(row, dict) or not isinstance(row.get(field), kind):
                raise InputError(f"{path}:{number}: field {field!r}: missing or of another type; give {form}")
        rows.append(row)
    rows = spread(rows, limit or len(rows))
    verdict_N = np.array(judge([(row["instruction"], row["answer"], row["question"]) for row in rows]))
    label_N = np.array([row["label"] for row in rows])

    def ratio(part, whole):
        return float(part / whole) if whole else None

    both, agreed = (verdict_N & label_N).sum(), (verdict_N == label_N).mean()
    chance = verdict_N.mean() * label_N.mean() + (1 - verdict_N.mean()) * (1 - label_N.mean())
    report = {"accuracy": float(agreed), "precision": ratio(both, verdict_N.sum()),
              "recall": ratio(both, label_N.sum()), "kappa": ratio(agreed - chance, 1 - chance), "n": len(rows),
              "labelled_yes": int(label_N.sum()), "judged_yes": int(verdict_N.sum()), "unreadable": judge.unreadable}
    return report, [{**row, "verdict": bool(verdict)} for row, verdict in zip(rows, verdict_N, strict=True)]


# ---------------------------------------------------------------- producing a row


def read_benchmark(path, limit=0):
    """Records of a file that can be scored without a judge; (records, SHA-256 of the file)."""
    records = rewards.read_records(path)
    for number, record in enumerate(records, 1):
        for k, constraint in enumerate(record.get("constraints", [])):
            if constraint["active"] and constraint["kind"] == "judge":
                raise InputError(f"{path}:{number}: field 'constraints[{k}]': judged, but there is no judge; "
                                 "remove it or set active to false: only code constraints can be scored")
    return spread(records, limit or len(records)), hashlib.sha256(Path(path).read_bytes()).hexdigest()


def model_stamp(name):
    """Changes when a local model folder is written anew, so that its old answers are not taken for the new model's."""
    weights = sorted(Path(name).glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weights]


def row_files(run, label):
    """(items file, settings file) of a row; the label I/O becomes the file name I-O."""
    name = "".join(c if c.isalnum() or c in " .+_" else "-" for c in label)
    return Path(run) / "rows" / f"{name}.jsonl", Path(run) / "rows" / f"{name}.json"


def open_row(cfg, label, model, method, benchmark):
    """(settings, finished items) of a row: those on disk if the settings are the same, else a new and empty row."""
    settings = {"label": label, "model": model, "method": method, "stamp": model_stamp(model), "benchmark": benchmark}
    settings |= {key: getattr(cfg, key) for key in ("family", "max_new_tokens", "limit", "engine", "precision")}
    items_file, settings_file = row_files(cfg.run, label)
    items = read_jsonl(items_file)
    if items:
        old = json.loads(settings_file.read_text(encoding="utf-8"))
        if (old["model"], old["method"]) != (model, method):
            raise InputError(f"{settings_file}: row {label!r} holds model {old['model']} with method {old['method']}; "
                             f"pass another --label or --run")
        changed = [key for key in settings if old[key] != settings[key]] + ["--no-resume"] * (not cfg.resume)
        if not changed:
            write_jsonl(items_file, items)  # without the last line that a killed run may have left half written
            return old, items
        print(f"row {label}: generated anew ({', '.join(changed)}); its earlier answers are in {items_file}.old")
        write_jsonl(f"{items_file}.old", items)
    settings |= {"seconds": 0.0, "perplexity": None}
    write_jsonl(items_file, [])
    write_atomic(settings_file, json.dumps(settings, indent=1))
    return settings, []


def generate_turns(engine, tokenizer, conversations, languages, mode, cfg):
    """Greedy assistant turns, prefill included: list of (text, truncated?)."""
    prompts = [render_prompt(tokenizer, messages, mode, family=cfg.family, language=language)
               for messages, language in zip(conversations, languages, strict=True)]
    ids, seeds = [prompt.ids for prompt in prompts], [0] * len(prompts)  # greedy decoding draws nothing
    completions = engine.generate(ids, n=1, max_tokens=cfg.max_new_tokens, temperature=0.0, seeds=seeds)
    return [(prompt.prefill + c.text, c.finish_reason == "length")
            for prompt, (c,) in zip(prompts, completions, strict=True)]


def answer_chunk(engine, tokenizer, records, method, cfg):
    """Items (the lines of a row file) for a few records."""
    conversations, languages = [r["messages"] for r in records], [r.get("language", "en") for r in records]
    thoughts = [("", False)] * len(records)  # (text, truncated?)
    if method == "sdc":  # call 1 thinks, only its thought is kept; call 2 sees request and thought in one user message
        first = generate_turns(engine, tokenizer, conversations, languages, "cot", cfg)
        thoughts = [(rewards.parse_response(text, cfg.family).think, cut) for text, cut in first]
        conversations = [sdc_messages(r, thought) for r, (thought, _) in zip(records, thoughts, strict=True)]
    turns = generate_turns(engine, tokenizer, conversations, languages, "io" if method == "sdc" else method, cfg)
    items = []
    for record, (text, truncated), (thought, thought_truncated) in zip(records, turns, thoughts, strict=True):
        if method != "sdc" and "</think>" in text:
            thought = rewards.parse_response(text, cfg.family).think
        answer = answer_text(text, cfg.family)
        answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        items.append({
            "id": record["id"],
            "text": text,
            "thought": thought,
            "answer": answer,
            **score_item(record, text, cfg.family),
            "format_ok": rewards.parse_response(text, cfg.family).format_ok if method == "cot" else None,
            "truncated": truncated or thought_truncated,
            "thought_tokens": len(tokenizer(thought, add_special_tokens=False)["input_ids"]),
            "answer_tokens": len(answer_ids),
            "repetition": repetition(answer_ids),
        })
    return items


def sdc_messages(record, thought):
    """The conversation of SDC's second call: the last request and the thought in one user message."""
    language = "zh" if record.get("language") == "zh" else "en"
    template = (data_dir / "prompts" / f"sdc.{language}.txt").read_text(encoding="utf-8")
    content = template.format(request=record["messages"][-1]["content"], thought=thought).strip()
    return record["messages"][:-1] + [{"role": "user", "content": content}]


def answer_row(cfg, label, model_name, method, records, benchmark, load):
    """Complete one row, chunk by chunk. `load(name)` gives (model, tokenizer, engine), only when needed.

    The ranks of torchrun share each chunk; rank 0 reads and writes.
    """
    rank, world = init_distributed()
    opened = open_row(cfg, label, model_name, method, benchmark) if rank == 0 else None
    settings, items = gather_objects([opened])[0]
    items_file, settings_file = row_files(cfg.run, label)
    done = {item["id"] for item in items}
    todo = [record for record in records if record["id"] not in done]
    with tqdm(total=len(records), initial=len(done), desc=label, unit="prompt", disable=rank > 0) as bar:
        for start in range(0, len(todo), cfg.chunk):
            _, tokenizer, engine = load(model_name)
            began = time.perf_counter()
            chunk = todo[start : start + cfg.chunk]
            own = chunk[rank::world]
            answered = gather_objects(answer_chunk(engine, tokenizer, own, method, cfg) if own else [])
            if rank == 0:
                answered = {item["id"]: item for item in answered}
                for record in chunk:
                    append_jsonl(items_file, answered[record["id"]])
                settings["seconds"] += time.perf_counter() - began
                write_atomic(settings_file, json.dumps(settings, indent=1))
            bar.update(len(chunk))


def read_rows(run, records, wanted):
    """Finished rows of a run folder on these records: {label: (settings, items in the order of the records)}."""
    rows = {}
    for settings_file in sorted((Path(run) / "rows").glob("*.json")):
        settings = json.loads(settings_file.read_text(encoding="utf-8"))
        items = {item["id"]: item for item in read_jsonl(settings_file.with_suffix(".jsonl"))}
        differs = [key for key in wanted if settings[key] != wanted[key]]
        if differs:
            print(f"row {settings['label']} is left out of the report: other {', '.join(differs)} than in this call")
        elif len(items) < len(records):
            print(f"row {settings['label']} is left out of the report: {len(items)} of {len(records)} prompts answered")
        else:
            rows[settings["label"]] = (settings, [items[record["id"]] for record in records])
    rank = {label: position for position, label in enumerate(ROW_ORDER)}
    return {label: rows[label] for label in sorted(rows, key=lambda label: (rank.get(label, len(rank)), label))}


def add_perplexity(cfg, records, rows, load):
    """Measure the perplexity of rows that lack it, on the same records in every row, and store it with the row."""
    chosen = spread(range(len(records)), cfg.perplexity_items)
    base = {"model": cfg.base_model, "answers": len(chosen)}
    for label, (settings, items) in rows.items():
        if chosen and (settings["perplexity"] or {}).get("base") != base:
            model, tokenizer, _ = load(cfg.base_model)
            some, answers = [records[k] for k in chosen], [items[k]["answer"] for k in chosen]
            settings["perplexity"] = {"base": base, "value": answer_perplexity(model, tokenizer, some, answers)}
            write_atomic(row_files(cfg.run, label)[1], json.dumps(settings, indent=1))


# ---------------------------------------------------------------- the report


def summarise(records, rows, *, resamples=10000, seed=0):
    """What report.md says, as one JSON object; `rows` as from read_rows. Shares in 0..1, an empty split is None."""
    labels, items_of = list(rows), {label: items for label, (_, items) in rows.items()}
    pairs = [(b, a) for a, b in combinations(labels, 2)][::-1]  # the later row minus the earlier, Ours first
    columns = {}  # name -> (values_N, weights_N)
    for label, items in items_of.items():
        asked_N = np.array([len(item["strict"]) for item in items])
        for mode in ("strict", "loose"):
            met_N = np.array([sum(item[mode]) for item in items])
            columns[label, f"all_{mode}"] = (met_N == asked_N).astype(float), np.ones(len(items))
            columns[label, f"each_{mode}"] = met_N, asked_N
    for a, b in pairs:
        columns[a, b] = columns[a, "all_strict"][0] - columns[b, "all_strict"][0], np.ones(len(records))
    values_NK, weights_NK = (np.stack([column[k] for column in columns.values()], axis=1) for k in (0, 1))

    report = {"n": len(records), "rows": {}, "differences": {}, "kinds": {}, "difficulty": None}
    for label, (settings, items) in rows.items():
        formats = [item["format_ok"] for item in items if item["format_ok"] is not None]
        averages = {key: float(np.mean([item[key] for item in items]))
                    for key in ("thought_tokens", "answer_tokens", "repetition", "truncated")}
        report["rows"][label] = {"settings": settings, "seconds": settings["seconds"], **averages,
                                 "format_failures": 1 - float(np.mean(formats)) if formats else None,
                                 "perplexity": (settings["perplexity"] or {}).get("value")}
    ood_N = np.array([bool(record.get("ood")) for record in records])
    for split, mask_N in zip(SPLITS, (np.ones_like(ood_N), ~ood_N, ood_N), strict=True):
        n = int(mask_N.sum())
        intervals = {}
        if n:
            stats = bootstrap(values_NK[mask_N], weights_NK[mask_N], resamples=resamples, seed=seed)
            intervals = {name: {"share": float(share), "low": float(low), "high": float(high), "n": n}
                         for name, share, low, high in zip(columns, *stats, strict=True)}
        for label in labels:
            names = ("all_strict", "all_loose", "each_strict", "each_loose")
            report["rows"][label][split] = {name: intervals[label, name] for name in names} if n else None
        for a, b in pairs:
            report["differences"].setdefault(f"{a} − {b}", {})[split] = intervals[a, b] if n else None

    for label, items in items_of.items():
        for item in items:
            for kind, met in zip(item["kinds"], item["strict"], strict=True):
                report["kinds"].setdefault(kind, {name: [] for name in labels})[label].append(met)
    for kind, verdicts in report["kinds"].items():
        shares = {label: float(np.mean(verdicts[label])) for label in labels}
        report["kinds"][kind] = {"n": len(verdicts[labels[0]]), **shares}
    report["kinds"] = dict(sorted(report["kinds"].items()))
    if "I/O" in rows:
        easy = [kind for kind, shares in report["kinds"].items() if shares["I/O"] > 0.9]
        report["difficulty"] = {"io_share": report["rows"]["I/O"]["all"]["all_strict"]["share"], "kinds_above_90": easy}
    return report


def percent(cell, signed=False):
    """A share or a difference with its interval, in percent (points)."""
    sign = "+" if signed else ""
    return f"{100 * cell['share']:{sign}.1f} [{100 * cell['low']:{sign}.1f}, {100 * cell['high']:{sign}.1f}]"


def table(header, lines):
    """A Markdown table; cells are made safe for it (line breaks, bars, tags)."""
    def row(cells):
        safe = [html.escape(str(cell), quote=False).replace("|", "\\|").replace("\n", "<br>") for cell in cells]
        return "| " + " | ".join(safe) + " |"
    return "\n".join([row(header), "|" + " --- |" * len(header), *map(row, lines)]) + "\n"


def report_markdown(report, records, rows, cfg, benchmark_path, plots):
    """report.md: the tables of `report`, the plots, and ten fixed prompts with the answers of all rows."""
    def or_dash(value, form):
        return "–" if value is None else format(value, form)

    splits = {split: next(iter(report["rows"].values()))[split] for split in SPLITS}
    n = {split: cells["all_strict"]["n"] if cells else 0 for split, cells in splits.items()}
    titles = [f"{split} (n={n[split]})" for split in SPLITS]
    main, cost, pairs = [], [], []
    for label, row in report["rows"].items():
        cells = [row[split] for split in SPLITS]
        main.append([label, *(percent(c["all_strict"]) if c else "–" for c in cells), percent(cells[0]["all_loose"]),
                     percent(cells[0]["each_strict"]), percent(cells[0]["each_loose"])])
        cost.append([label, row["settings"]["model"], row["settings"]["method"], or_dash(row["format_failures"], ".1%"),
                     f"{row['truncated']:.1%}", f"{row['thought_tokens']:.1f}", f"{row['answer_tokens']:.1f}",
                     or_dash(row["perplexity"], ".1f"), f"{row['repetition']:.1%}", f"{row['seconds']:.0f}"])
    for name, difference in report["differences"].items():
        unclear = [split for split, d in difference.items() if d and d["low"] <= 0 <= d["high"]]
        reading = f"the interval includes 0 ({', '.join(unclear)}): no difference shown" if unclear else "clear of 0"
        pairs.append([name, *(percent(d, signed=True) if d else "–" for d in difference.values()), reading])
    kinds = [[kind, row["n"], *(f"{100 * row[label]:.1f}" for label in rows)] for kind, row in report["kinds"].items()]
    text = [
        "# Evaluation\n",
        f"{n['all']} prompts of `{benchmark_path}`; `ood`: those marked as out of distribution. "
        f"Greedy decoding, at most {cfg.max_new_tokens} new tokens a turn in every row. In brackets: 95 % percentile-"
        f"bootstrap intervals over prompts ({cfg.resamples} resamples); differences are paired by prompt.\n",
        "## Constraints met\n\nShare of prompts with all constraints met (strict, unless it says loose), and share of "
        "single constraints met, over all prompts; in percent.\n",
        table(["row", *titles, "all met, loose", "per constraint", "per constraint, loose"], main),
        "## Differences between rows\n\nAll constraints met, strict, in percentage points.\n",
        table(["rows", *titles, "reading"], pairs),
        "## Format, length and fluency\n\nTruncated: the turn hit the token limit. Tokens: mean per prompt, row's own "
        f"tokenizer. Perplexity: of the answer after the plain request under {cfg.base_model}, on "
        f"{min(cfg.perplexity_items, report['n'])} prompts, the same in every row. Repetition: share of the answer's "
        "4-grams that occurred before in it.\n",
        table(["row", "model", "method", "format failures", "truncated", "thought tokens", "answer tokens",
               "perplexity", "repetition", "seconds"], cost),
        "## Per kind of constraint\n\nConstraints met, strict, in percent.\n",
        table(["kind", "n", *rows], kinds),
    ]
    if report["difficulty"]:
        easy = ", ".join(report["difficulty"]["kinds_above_90"]) or "none"
        text.append(f"Difficulty: I/O meets all constraints on {report['difficulty']['io_share']:.1%} of the prompts; "
                    f"kinds it meets above 90 %: {easy}.\n")
    text += [f"![{name}]({name})\n" for name in plots]
    text.append("## Ten prompts, all rows\n")
    for k in spread(range(len(records)), 10):
        met = [f"{sum(items[k]['strict'])}/{len(items[k]['strict'])}" for _, items in rows.values()]
        text.append("> " + records[k]["messages"][-1]["content"].replace("\n", "\n> ") + "\n")
        text.append(table([records[k]["id"], *rows], [
            ["thought", *(items[k]["thought"] for _, items in rows.values())],
            ["answer", *(items[k]["answer"] for _, items in rows.values())],
            ["met", *met],
        ]))
    return "\n".join(text)


def plot_rows(report, path):
    """Bars: share of prompts with all constraints met, per row and split, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = list(report["rows"])
    fig, ax = plt.subplots(figsize=(1.5 + 1.4 * len(labels), 3.6), layout="constrained")
    for position, split in enumerate(SPLITS):
        if report["rows"][labels[0]][split]:
            cells = [report["rows"][label][split]["all_strict"] for label in labels]
            share_K, low_K, high_K = (np.array([cell[key] for cell in cells]) for key in ("share", "low", "high"))
            x_K = np.arange(len(labels)) + 0.27 * (position - 1)
            ax.bar(x_K, share_K, 0.25, yerr=np.maximum(0, [share_K - low_K, high_K - share_K]), capsize=2, label=split)
    ax.set(xticks=range(len(labels)), xticklabels=labels, ylim=(0, 1), ylabel="all constraints met (strict)")
    fig.legend(loc="outside upper center", ncols=len(SPLITS), frameon=False)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def plot_training(curves, path):
    """One panel per (title, x_N, y_N); nothing is smoothed, so that what is seen is what was logged."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(curves), figsize=(3.2 * len(curves), 2.8), layout="constrained", squeeze=False)
    for ax, (title, x, y) in zip(axes[0], curves, strict=True):
        ax.plot(x, y, linewidth=1)
        ax.set(title=title, xlabel="step")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def training_curves(cfg):
    """(title, steps, values) of what sft.py and grpo.py logged beside the models of the rows SFT and Ours."""
    wanted = [("sft", cfg.sft_model, key) for key in ("loss", "val_loss")]
    wanted += [("grpo", cfg.ours_model, key) for key in ("reward", "all_met", "skip_rate")]
    curves = []
    for stage, model, key in wanted:
        metrics = read_jsonl(Path(model).parent / "metrics.jsonl")
        points = [(row["step"], row[key]) for row in metrics if "step" in row and row.get(key) is not None]
        if points:
            curves.append((f"{stage}: {key}", *zip(*points, strict=True)))
    return curves


def write_report(cfg, records, rows, benchmark_path):
    """report.json, report.md and the PNG plots in the run folder; returns the report."""
    report = {"benchmarks": str(benchmark_path), "settings": asdict(cfg),
              **summarise(records, rows, resamples=cfg.resamples, seed=cfg.seed)}
    folder, plots, curves = Path(cfg.run), ["rows.png"], training_curves(cfg)
    plot_rows(report, folder / "rows.png")
    if curves:
        plot_training(curves, folder / "training.png")
        plots.append("training.png")
    write_atomic(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False))
    write_atomic(folder / "report.md", report_markdown(report, records, rows, cfg, benchmark_path, plots))
    return report


def main(argv=None):
    cfg = parse_flags(Config, argv)
    if cfg.judge_agreement:
        judge = make_judge(cfg.judge, cfg.judge_url, precision=cfg.precision, cache=Path(cfg.run) / "judge_cache")
        if judge is None:
            raise InputError("--judge-agreement: which judge? give --judge MODEL, with --judge-url if it is served")
        agreement, verdicts = judge_agreement(judge, cfg.judge_agreement, cfg.limit)
        write_jsonl(Path(cfg.run) / "judge_agreement.jsonl", verdicts)
        print(json.dumps({"judge": cfg.judge, **agreement}))
        return
    path = Path(cfg.benchmarks or "runs/evolve/heldout.jsonl")
    if not cfg.benchmarks and not path.exists():
        print(f"{path} is not there (evolve.py writes it): evaluating on the shipped {data_dir.name}/heldout.jsonl")
        path = data_dir / "heldout.jsonl"
    records, sha = read_benchmark(path, cfg.limit)
    if cfg.method not in ("", *METHODS):
        raise InputError(f"--method {cfg.method}: unknown; give one of {', '.join(METHODS)}")
    if cfg.model or cfg.method or cfg.label:
        method = cfg.method or "cot"
        jobs = [(cfg.label or METHODS[method], cfg.model or cfg.base_model, method)]
    else:
        for model, stage in ((cfg.sft_model, "sft.py"), (cfg.ours_model, "grpo.py")):
            if not (Path(model) / "config.json").is_file():
                raise InputError(f"{model}: no model there; run python {stage} first, or give --model for one row")
        jobs = [("I/O", cfg.base_model, "io"), ("CoT", cfg.base_model, "cot"),
                ("SFT", cfg.sft_model, "cot"), ("Ours", cfg.ours_model, "cot")]
    rank, _ = init_distributed()
    open_run(cfg.run, cfg, resume=True)

    loaded = {}

    def load(name):
        if name not in loaded:
            loaded.clear()  # one model in memory at a time
            model, tokenizer = load_model(name, dtype=compute_dtype(cfg.precision))
            engine = make_engine(cfg.engine, model, tokenizer, source=name, max_length=4096 + cfg.max_new_tokens)
            engine.wake()
            engine.sync(model)
            loaded[name] = model, tokenizer, engine
        return loaded[name]

    for label, model, method in jobs:
        answer_row(cfg, label, model, method, records, sha, load)
    if rank:
        return
    wanted = {"benchmark": sha, "limit": cfg.limit, "max_new_tokens": cfg.max_new_tokens}
    rows = read_rows(cfg.run, records, wanted)
    add_perplexity(cfg, records, rows, load)
    report = write_report(cfg, records, rows, path)
    for label, row in report["rows"].items():
        print(f"{label:8} all constraints met {percent(row['all']['all_strict'])} %  ({row['seconds']:.0f} s)")
    print(f"report: {Path(cfg.run) / 'report.md'}")


if __name__ == "__main__":
    launch(main)
