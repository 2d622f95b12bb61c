"""Stage 1: plain requests become checked instructions with constraints, and expert answers that meet them all.

    python evolve.py                             recorded teacher of data/ -> runs/evolve/{train,rl,dev,heldout}.jsonl
    python evolve.py --recorded my_rows.jsonl    your own rows, in the form of data/teacher.jsonl
    python evolve.py --llm Qwen/Qwen2.5-72B-Instruct@http://localhost:8000/v1 --seeds allenai/WildChat --rows 50000
    torchrun --standalone --nproc-per-node 8 evolve.py --llm Qwen/Qwen2.5-7B-Instruct --seeds my_requests.jsonl

One path, whoever answers: requests -> tags -> constraints, drawn for code or rewritten from an exemplar for a judge ->
words that suit the request -> one natural instruction -> a second look at it -> expert answers -> checks by code and
judge -> seven filters -> files. Each step that needs a language model calls `ask(step, items, write, read)`. Behind
it stands a served model (NAME@URL), a model in this process (NAME), or the recorded teacher: rows that carry their
constraints and the replies to merging and expert; what nobody was asked appears as such in the funnel, never as passed.
What fails is dropped and counted. The prompts are files in data/prompts/.

train.jsonl holds the experts (sft.py, cloning), rl.jsonl the prompts of GRPO, dev.jsonl what settings are chosen by,
heldout.jsonl what is looked at once. A request is on one side only, by a row's own `split` or by a constant hash.
"""

import hashlib
import json
import random
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from statistics import mean
from typing import Literal

import rewards
from model import (
    Completion,
    ask_until_readable,
    data_dir,
    gather_objects,
    init_distributed,
    is_main,
    judge_prompt,
    launch,
    markdown_table,
    open_chat,
    open_run,
    parse_flags,
    prompt_text,
    read_jsonl,
    read_verdict,
    sum_over_ranks,
    write_atomic,
    write_jsonl,
)
from rewards import CONSTRAINTS, InputError, filled

# Never drawn for training: what is learned about the other types has to carry over to these.
OOD_TYPES = tuple(name for name, constraint in CONSTRAINTS.items() if constraint.ood)
COMPOSITIONS = ("and", "chain", "selection", "nested")
COUNT_WEIGHTS = (0.3, 0.3, 0.2, 0.1, 0.1)  # of code-verified instructions with 1, 2, 3, 4 and 5 constraints
SPLITS = ("train", "rl", "dev", "heldout")
NOT_ASKED = "not asked (read by people)"


@dataclass
class Config:
    llm: str = ""  # model that tags, writes and filters: NAME@URL (served) or NAME (loaded here); none: --recorded
    expert: str = ""  # model that answers, NAME[@URL] (default: --llm)
    judge: str = ""  # model that checks answers against judge constraints, NAME[@URL] (default: --llm)
    seeds: str = ""  # requests: own, record, Alpaca or WildChat rows (JSONL, JSON, Parquet) or a hub data set's name
    recorded: str = ""  # instead of --llm: records, with expert or without (default: the four files of data/)
    language: Literal["en", "zh", "both"] = "en"  # with --llm: language of the requests
    limit: int = 0  # use only so many requests, or recorded rows of each file; 0 = all
    dry_run: int = 0  # take so many requests through all steps, print what each step made, write no training files
    types: str = "ifeval"  # types drawn for code: ifeval (25), all or names a,b,…, which also choose recorded rows
    max_constraints: int = 0  # leave out recorded rows with more; most that are drawn for code; 0 = all rows, 5 drawn
    answer_words: int = 0  # leave out recorded rows whose experts have longer answers; 0 = none
    judge_share: float = 0.5  # share of the requests that get judge-verified constraints; the others code-verified
    tries: int = 3  # expert answers per instruction; the shortest that passes is kept
    temperature: float = 0.6  # of the expert answers
    max_tokens: int = 4096  # longest reply of a model; a longer one counts as none
    concurrency: int = 16  # requests to a server under way at a time
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # arithmetic of a model in this process
    rows: int = 0  # read only the first so many rows of --seeds, for data sets of the hub; 0 = all
    seed_words: int = 300  # longest request, in words (1.6 characters a word in Chinese); the shortest has 3
    ability_cap: int = 0  # most requests of one ability; 0 = no cap
    benchmark_dir: str = ""  # folder of benchmark files; requests and records that overlap with them are dropped
    math: str = ""  # file of math records, or of DeepScaleR, GSM8K or MATH rows (default: the shipped arithmetic)
    math_ratio: float = 0.1  # math records per instruction record in train.jsonl (if they have experts) and rl.jsonl
    raif: str = ""  # copies of the released RAIF files, comma-separated: turned into records, nothing else is done
    seed: int = 0  # of every draw; which side of the split a request is on does not depend on it
    out: str = "runs/evolve"  # folder of the results; finished calls found there are not made again


PRESETS = {
    "lesson": dict(  # the whole way in minutes: one constraint of four types, short answers
        types="change_case:english_capital,change_case:english_lowercase,detectable_format:json_format,"
              "startend:quotation", max_constraints=1, answer_words=60, math_ratio=0.0, out="runs/lesson/evolve"),
}


# ---------------------------------------------------------------- step 1: requests


def rows_of(source: str):
    """(place, row) of each object in a JSON Lines, JSON or Parquet file, or in a hub data set (streamed)."""
    path = Path(source)
    if not path.exists() and path.suffix not in (".jsonl", ".json", ".parquet"):
        from datasets import load_dataset

        try:
            rows = load_dataset(source, split="train", streaming=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{source}: neither a file nor a data set of the hub ({error}); check the name") from None
    elif path.suffix == ".parquet" and path.exists():
        import pyarrow.parquet  # comes with datasets

        try:
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(1000)
        except ValueError as error:
            raise InputError(f"{path}: is not Parquet ({error}); give a whole file") from None
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
    elif path.suffix == ".json" and path.exists():
        try:
            value = json.loads(path.read_text("utf-8-sig"))
        except ValueError:  # not one value: one object a line
            value = [row for _, row in rewards.json_lines(path)]
        rows = as_list(value)
    else:
        rows = (row for _, row in rewards.json_lines(path))
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{source}:{number}: not a JSON object; one object per line is expected")
        yield f"{source}:{number}", row


_OTHER_FORMS = ("messages", "conversation", "conversations", "instruction", "prompt")


def request_of(row: dict):
    """The first user turn of a chat, or the instruction with its input (Alpaca, self-instruct), or the prompt."""
    for name in _OTHER_FORMS[:3]:
        if row.get(name):
            users = [turn for turn in row[name] if turn.get("role", turn.get("from")) in ("user", "human")]
            if not users:
                return None
            return users[0].get("content", users[0].get("value"))
    if "instruction" in row:
        given = row.get("input") or (row.get("instances") or [{}])[0].get("input")
        return "\n\n".join(filter(None, (row["instruction"], given)))
    return row.get("prompt")


_ENGLISH = frozenset("the a an of to and in is are for with that what how you i it on this can do my your be".split())


def language_of(text: str) -> str | None:
    """en, zh or None: most texts are told by their script or by common words; the slow detector sees the rest."""
    words = tokens(text)
    if len(re.findall("[\u3041-\u30fe]", text)) > 2:  # kana
        return None
    if sum("\u4e00" <= word <= "\u9fff" for word in words) > 0.3 * len(words):
        return "zh"
    if sum(word in _ENGLISH for word in words) > 0.2 * len(words) or rewards.detect_language(text) == "en":
        return "en"
    return None


def own_seed(row: dict, where: str) -> dict:
    """A row of the project's own form (id, language, text), checked."""
    if row.get("language") not in ("en", "zh"):
        raise InputError(f"{where}: field 'language': {row.get('language')!r} is unknown; use en or zh")
    for field in ("id", "text"):
        if not filled(row.get(field)):
            raise InputError(f"{where}: field '{field}': missing or empty; give it a text")
    return row


def other_seed(row: dict, where: str, source: str, counts: Counter) -> dict | None:
    """A row of another form as {id, language, text}; None (counted) if it is of no use."""
    try:
        text = request_of(row)
    except (AttributeError, IndexError, TypeError):
        text = None
    if not filled(text) and Path(source).exists():
        raise InputError(f"{where}: no text of a user turn, instruction or prompt; fix or remove the line")
    if not filled(text):  # of the hub: nobody can fix it
        counts["no text"] += 1
        return None
    language = language_of(text)
    if row.get("toxic"):
        counts["toxic"] += 1
        return None
    if not language:
        counts["other language"] += 1
        return None
    # By its text, so that it stays on its side of the split in whichever line or file it stands.
    digest = hashlib.sha256(text.strip().encode()).hexdigest()[:12]
    return {"id": f"{Path(source).stem}-{digest}", "language": language, "text": text.strip()}


def read_seeds(cfg: Config, counts: Counter) -> list[dict]:
    """The plain requests: {id, language, text}, with topic and ability where the file has them."""
    shipped = {"en": ["seeds"], "zh": ["seeds_zh"], "both": ["seeds", "seeds_zh"]}[cfg.language]
    sources = [str(data_dir / f"{name}.jsonl") for name in shipped]
    if cfg.seeds:
        sources = [cfg.seeds]
    seeds, first_seen = [], {}
    for source in sources:
        for where, row in islice(rows_of(source), cfg.rows or None):
            own = row.keys() >= {"text", "language"} or not row.keys() & set(_OTHER_FORMS)
            if own:
                seed = own_seed(row, where)
            elif filled(row.get("request")) and filled(row.get("seed")):  # a record: the request it was made from
                seed = {"id": row["seed"], "language": row.get("language", "en"), "text": row["request"]}
            else:
                seed = other_seed(row, where, source, counts)
            if seed is None:
                continue
            if not own and seed["id"] in first_seen:
                counts["exact duplicate"] += 1
                continue
            if seed["id"] in first_seen:
                raise InputError(
                    f"{where}: field 'id': {seed['id']!r} is that of {first_seen[seed['id']]}; make it unique"
                )
            first_seen[seed["id"]] = where
            length = count_words(seed["text"])
            if seed["language"] == "zh":
                length /= 1.6
            if length < 3:
                counts["too short"] += 1
            elif length > cfg.seed_words:
                counts["too long"] += 1
            elif cfg.language not in (seed["language"], "both"):
                counts["not in --language"] += 1
            else:
                seeds.append(seed)
    if not seeds:
        dropped = ", ".join(f"{reason} {n}" for reason, n in counts.items())
        raise InputError(f"{', '.join(sources)}: no request is usable ({dropped or 'no rows'}); change --language, "
                         "--seed-words or the file")
    return seeds


def count_words(text: str) -> int:
    return len(re.findall(r"[\u4e00-\u9fff]|[^\s\u4e00-\u9fff]+", text))


def tokens(text: str) -> list[str]:
    """Words in lower case, each Chinese character one: the unit of near-duplicates and of contamination."""
    return re.findall(r"[a-z0-9']+|[\u4e00-\u9fff]", text.lower())


def shingles(text: str) -> set:
    """Sets of three neighbouring words (three characters in Chinese), the unit of near-duplicate search."""
    words = tokens(text)
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def drop_duplicates(seeds: list[dict], counts: Counter, threshold=0.5) -> list[dict]:
    """Keep the first of each group whose shingles overlap (Jaccard) by `threshold` or more.

    MinHash proposes the pairs (20 bands of 3: 93 % of those at the threshold, all far above it), the sets decide.
    """
    from rensa import RMinHash, RMinHashLSH

    kept, index = [], RMinHashLSH(threshold=threshold, num_perm=60, num_bands=20)
    for seed in seeds:
        own = shingles(seed["text"])
        signature = RMinHash(num_perm=60, seed=1)
        signature.update([" ".join(shingle) for shingle in sorted(own)])
        others = (shingles(kept[i]["text"]) for i in index.query(signature))
        overlap = max((len(own & other) / len(own | other) for other in others), default=0.0)
        if overlap < threshold:
            index.insert(len(kept), signature)
            kept.append(seed)
        elif overlap < 1:
            counts["near duplicate"] += 1
        else:
            counts["exact duplicate"] += 1
    return kept


NGRAM = 13  # words (Chinese: characters) in a row that make an overlap with a benchmark


def grams(text: str):
    """The runs of NGRAM words; of a shorter text all its words, if they are at least six."""
    words = tokens(text)
    return (tuple(words[i : i + NGRAM]) for i in range(max(len(words) >= 6, len(words) - NGRAM + 1)))


def strings(value):
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def read_benchmarks(folder: str) -> dict[int, str]:
    """Hash of each run of NGRAM words in any text of any file in the folder -> name of the file."""
    if not folder:
        return {}
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix in (".json", ".jsonl", ".parquet"))
    if not files:
        raise InputError(f"{folder}: holds no .json, .jsonl or .parquet file; give the benchmarks' folder")
    known: dict[int, str] = {}
    for path in files:
        for _, row in rows_of(str(path)):
            for text in strings(row):
                known |= {hash(gram): str(path.relative_to(folder)) for gram in grams(text)}
    return known


def drop_contaminated(rows: list[dict], known: dict[int, str], hits: list[dict]) -> list[dict]:
    """The rows (requests or records) that share no run of words with a benchmark; the others are listed in hits."""
    if not known:
        return rows
    clean = []
    for row in rows:
        if "messages" in row:
            text = row["messages"][-1]["content"]
        else:
            text = row["text"]
        gram = next((gram for gram in grams(text) if hash(gram) in known), None)
        if gram is None:
            clean.append(row)
        else:
            hits.append({"id": row["id"], "file": known[hash(gram)], "overlap": " ".join(gram), "text": text})
    return clean


def tag(seeds: list[dict], ask, counts: Counter) -> list[dict]:
    """The requests with ability and topic group, their own or the model's; one in none of the paper's groups goes."""
    topics = json.loads((data_dir / "abilities.json").read_text("utf-8"))
    shown = "\n".join(f"- {topic}: {', '.join(abilities)}" for topic, abilities in topics.items())

    def write(seed):
        return prompt_text("evolve_tag", abilities=shown, request=seed["text"])

    def read(seed, reply):
        topic, ability = read_json(reply, "topic"), read_json(reply, "ability")
        if topic == "other" or (topic in topics and filled(ability)):
            return {"topic": topic, "ability": ability}
        return None

    untagged = [seed for seed in seeds if not filled(seed.get("ability")) or not filled(seed.get("topic"))]
    tags = dict(zip((seed["id"] for seed in untagged), ask("tag", untagged, write, read), strict=True))
    tagged = []
    for seed in seeds:
        own = tags.get(seed["id"], {})
        if own is None:
            counts["no tag"] += 1
        elif own.get("topic") == "other":
            counts["other topic"] += 1
        else:
            tagged.append(seed | own)
    return tagged


def choose(seeds: list[dict], ask, cfg: Config, counts: Counter) -> list[dict]:
    """--limit requests with tags, at most --ability-cap of each ability; tagged in parts, so that few are in vain."""
    chosen, per_ability, size = [], Counter(), 512
    if cfg.limit:
        size = min(size, max(16, 2 * cfg.limit))
    parts = (tag(seeds[start : start + size], ask, counts) for start in range(0, len(seeds), size))
    for seed in chain.from_iterable(parts):
        per_ability[seed["ability"]] += 1
        if cfg.ability_cap and per_ability[seed["ability"]] > cfg.ability_cap:
            counts["over the cap of its ability"] += 1
        else:
            chosen.append(seed)
        if len(chosen) == cfg.limit:
            break
    counts["kept"] = len(chosen)
    return chosen


def split_of(request_id: str) -> str:
    """train, dev or heldout, by a constant hash of the request's id, for rows that do not say it themselves.

    Neither --seed nor further requests move one to another side.
    """
    share = int.from_bytes(hashlib.sha256(f"0/{request_id}".encode()).digest()[:4], "big") / 2**32
    if share < 0.3:
        return "heldout"
    return "dev" if share < 0.393 else "train"


# ---------------------------------------------------------------- whoever answers

ATTEMPTS = 5  # unusable replies to one question before it counts as unanswered


def ask_recorded(step, items, write, read, **_) -> list:
    """`ask` of the recorded teacher: the reply that an item brings along, NOT_ASKED where it brings none."""
    values = []
    for item in items:
        value = NOT_ASKED
        if step in item["replies"]:
            value = read(item, Completion([], item["replies"][step], "stop"))
        values.append(value)
    return values


def make_ask(cfg: Config, folder: Path, spent: dict):
    """ask(step, items, write, read): one value per item, the only way to a model.

    write(item) is the prompt (a text or messages); read(item, reply) the value, or None for a reply that cannot be
    used, which is asked for again with another seed. The value stays None after `attempts`. Every reply is a line of
    calls.jsonl and adds to spent[step]. Finished replies are kept in --out/calls: a killed run repeats none of a
    server's, at most one chunk of a local model's. The ranks of torchrun share the items of each call.
    """
    roles = {"llm": cfg.llm, "expert": cfg.expert or cfg.llm, "judge": cfg.judge or cfg.llm}
    settings = {"concurrency": cfg.concurrency, "timeout": 600.0, "skip_refused": True}
    chats = {name: open_chat(name, precision=cfg.precision, cache=Path(cfg.out) / "calls", **settings)
             for name in set(roles.values())}
    rank, world = init_distributed()
    if rank == 0:
        write_atomic(folder / "calls.jsonl", "")

    def ask(step, items, write, read, *, role="llm", temperature=0.0, seed=0, attempts=ATTEMPTS) -> list:
        chat = chats[roles[role]]
        before = dict(chat.tokens)
        if rank == 0:
            chat.progress = step

        def once(attempt, pending):
            """(reply, value) of each pending item."""
            talks = [as_messages(write(items[i])) for i in pending]
            own = range(rank, len(talks), world)
            warmth = max(temperature, 0.7) if attempt else temperature  # a greedy reply would only come again
            answered = chat.chat([talks[k] for k in own], max_tokens=cfg.max_tokens, temperature=warmth,
                                 seed=cfg.seed + seed + 1000 * attempt)
            replies = dict(gather_objects([(k, reply) for k, [reply] in zip(own, answered, strict=True)]))
            outcomes = []
            for k, i in enumerate(pending):
                value = None
                if replies[k].finish_reason == "stop":
                    value = read(items[i], replies[k])
                outcomes.append((replies[k], value))
            if rank == 0:
                log_calls(folder, step, attempt, talks, outcomes)
            refused = sum(reply.finish_reason == "refused" for reply in replies.values())
            spent[step]["calls"] += len(pending)
            spent[step]["refused"] += refused
            spent[step]["cut"] += sum(reply.finish_reason == "length" for reply in replies.values())
            if refused == len(pending) and attempt == 0:
                raise InputError(f"{roles[role]}: all {len(pending)} requests of step {step!r} were refused "
                                 f"({replies[0].reasoning}); a smaller --max-tokens leaves more room for the prompt")
            return outcomes

        def is_final(i, outcome):
            reply, value = outcome
            return value is not None or reply.finish_reason == "refused"  # it would be refused again

        outcomes = ask_until_readable(once, len(items), is_final, attempts)
        for name, count in chat.tokens.items():
            spent[step][name] += round(sum_over_ranks(count - before[name]))
        return [value for _, value in outcomes]

    return ask


def as_messages(prompt) -> list[dict]:
    """A prompt, a text or messages, as messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def log_calls(folder: Path, step: str, attempt: int, talks, outcomes) -> None:
    """Append calls, messages with (reply, value), to calls.jsonl."""
    with open(folder / "calls.jsonl", "a", encoding="utf-8") as log:
        for messages, (reply, value) in zip(talks, outcomes, strict=True):
            row = {"step": step, "attempt": attempt, "used": value is not None, "messages": messages,
                   "reply": reply.text, "reasoning": reply.reasoning, "finish": reply.finish_reason}
            log.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_json(reply, field: str):
    """A field of the JSON object in a reply, None where there is none (fences and a thought around it are fine)."""
    found = re.search(r"\{.*\}", reply.text.rpartition("</think>")[2], re.S)
    if not found:
        return None
    try:
        value = json.loads(found[0])
        json.dumps(value, ensure_ascii=False).encode()  # half an emoji could not be written to a file
    except (ValueError, RecursionError):
        return None
    return value.get(field)


def read_word(reply, known: str) -> str | None:
    """The one of the words `known` ("true|false|na") that opens a reply or is alone in it; lower case."""
    text = reply.text.rpartition("</think>")[2].lower()
    opening = re.match(rf"\W*({known})\b", text)
    if opening:
        return opening[1]
    words = set(re.findall(rf"\b(?:{known})\b", text))
    return words.pop() if len(words) == 1 and "not" not in text else None


def tally(counts: Counter, verdicts, reason: str) -> None:
    """Count verdicts: True is kept, NOT_ASKED a class of its own, everything else dropped for the reason."""
    for verdict in verdicts:
        counts[{True: "kept", NOT_ASKED: NOT_ASKED}.get(verdict, reason)] += 1


def keep(folder: Path, step: str, rows) -> None:
    """What a step made, as steps/NUMBER-step.jsonl."""
    if is_main():
        number = len(list((folder / "steps").glob("*.jsonl")))
        write_jsonl(folder / "steps" / f"{number}-{step}.jsonl", rows)


# ---------------------------------------------------------------- step 2: constraints
#
# A record on its way is a draft: a dict with the record's fields, `request` (the plain text), `example` (the exemplar
# that it follows) and, from the recorded teacher, `replies`.

LANGUAGES = {"en": "English", "zh": "Chinese"}


def chosen_types(cfg: Config) -> list[str]:
    """The constraint types of --types."""
    if cfg.types == "all":
        return list(CONSTRAINTS)
    if cfg.types == "ifeval":
        return list(rewards.COMPAT)
    names = cfg.types.split(",")
    for name in names:
        if name not in CONSTRAINTS:
            raise InputError(f"--types: {name!r} is unknown; give ifeval, all, or names such as "
                             "punctuation:no_comma,keywords:order (data/constraints.jsonl lists them)")
    return names


def plan_drafts(seeds: list[dict], ask, cfg: Config, funnel) -> list[dict]:
    """A draft with constraints for each request: drawn ones for code, or an exemplar's parts rewritten for a judge."""
    exemplars = defaultdict(list)
    for exemplar in read_jsonl(data_dir / "exemplars.jsonl"):
        exemplars[exemplar["language"], exemplar["composition"]].append(exemplar)
    tried, coded, judged = defaultdict(Counter), [], []
    for seed in seeds:
        rng, split = random.Random(f"{cfg.seed}/plan/{seed['id']}"), split_of(seed["id"])
        draft = {"id": seed["id"], "seed": seed["id"], "source": "evolve", "task": "instruction",
                 "language": seed["language"], "request": seed["text"], "topic": seed["topic"], "split": split}
        by_judge = rng.random() < cfg.judge_share
        draft["composition"] = "and"
        if by_judge:
            draft["composition"] = rng.choice(COMPOSITIONS)
        draft["example"] = rng.choice(exemplars[seed["language"], draft["composition"]])
        if by_judge:
            judged.append(draft)
        else:
            types = chosen_types(cfg)
            if cfg.types in ("ifeval", "all"):  # names are taken as given
                types = [name for name in types if name not in OOD_TYPES]
                if split == "heldout" and rng.random() < 1 / 3:
                    types = list(OOD_TYPES)
            weights = COUNT_WEIGHTS[: cfg.max_constraints or None]
            wanted = rng.choices(range(1, len(weights) + 1), weights)[0]
            coded.append(draft | {"constraints": draw_constraints(rng, draft, types, tried[split], wanted)})
    suggest_words(coded, ask)
    for draft in coded:
        rng = random.Random(f"{cfg.seed}/wording/{draft['id']}")
        for c in draft["constraints"]:
            c["text"] = rewards.render(c["id"], c["kwargs"], draft["language"], rng.randrange(1000))
    judged = rewrite_parts(judged, ask, funnel["judge constraints"])
    return coded + judged


def draw_constraints(rng, draft: dict, types, tried: Counter, wanted: int) -> list[dict]:
    """At most `wanted` compatible constraints that code verifies; types drawn least so far come first."""
    constraints: list[dict] = []
    for name in sorted(types, key=lambda name: tried[name] + 3 * rng.random()):
        if not rewards.compatible([name, *(c["id"] for c in constraints)]):
            continue
        kwargs = CONSTRAINTS[name].sample(rng, draft["language"], draft["request"])
        if kwargs is not None:
            tried[name] += 1
            constraints.append({"kind": "code", "id": name, "kwargs": kwargs, "depends_on": [], "active": True})
        if len(constraints) == wanted:
            break
    return constraints


WORDED = {  # the types whose words have to suit the request, and the arguments that hold them
    "keywords:existence": "keywords",
    "keywords:frequency": "keyword",
    "keywords:forbidden_words": "forbidden_words",
    "length_constraints:nth_paragraph_first_word": "first_word",
}


def as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def taken_words(draft: dict, constraint: dict) -> set[str]:
    """What a suggestion must not repeat: the other constraints' words, and the request's where words are forbidden."""
    named = set()
    for other in draft["constraints"]:
        if other is not constraint:
            words = chain.from_iterable(map(as_list, other["kwargs"].values()))
            named |= {str(word).casefold() for word in words}
    if "forbidden_words" in constraint["kwargs"]:  # an answer could hardly avoid the request's own words
        named |= set(tokens(draft["request"]))
    return named


def suggest_words(drafts: list[dict], ask) -> None:
    """Words of the model's choice for the WORDED types; where none is usable the drawn ones stay.

    Usable: a single word in the request's language that no other constraint of the draft names.
    """
    items = [(draft, c) for draft in drafts for c in draft["constraints"] if c["id"] in WORDED]

    def count(constraint):
        return len(as_list(constraint["kwargs"][WORDED[constraint["id"]]]))

    def write(item):
        draft, constraint = item
        rule = rewards.render(constraint["id"], constraint["kwargs"], draft["language"], 0)
        taken = ", ".join(sorted(taken_words(draft, constraint))) or "(none)"
        return prompt_text("evolve_words", request=draft["request"], rule=rule, count=count(constraint) + 2,
                           language=LANGUAGES[draft["language"]], taken=taken)

    def read(item, reply):
        draft, constraint = item
        form = re.compile({"en": r"[A-Za-z][A-Za-z'-]{1,24}", "zh": "[\u4e00-\u9fff]{1,6}"}[draft["language"]])
        taken, offered = taken_words(draft, constraint), as_list(read_json(reply, "words"))
        single = [word for word in offered if isinstance(word, str) and form.fullmatch(word)]
        words = list(dict.fromkeys(word for word in single if word.casefold() not in taken))
        return words[: count(constraint)] if len(words) >= count(constraint) else None

    for (draft, constraint), words in zip(items, ask("words", items, write, read, temperature=0.7), strict=True):
        # An earlier suggestion of this call may have taken one of the words.
        if words and not {word.casefold() for word in words} & taken_words(draft, constraint):
            name = WORDED[constraint["id"]]
            if not isinstance(constraint["kwargs"][name], list):
                [words] = words
            constraint["kwargs"] = constraint["kwargs"] | {name: words}


def conditions_of(item: dict) -> list:
    """The condition of a Selection and the one inside it, as far as there are any."""
    conditions = [item.get("condition")]
    if isinstance(conditions[0], dict):
        conditions.append(conditions[0].get("inner"))
    return [condition for condition in conditions if condition]


def has_texts(rows, count: int, *names: str) -> bool:
    """A list of `count` objects whose fields `names` are texts?"""
    if not isinstance(rows, list) or len(rows) != count:
        return False
    return all(isinstance(row, dict) and all(filled(row.get(name)) for name in names) for row in rows)


def fill_prompt(name: str, draft: dict, **slots) -> str:
    """A prompt file with the draft's request, language and exemplar in it."""
    example = {key: value for key, value in draft.get("example", {}).items() if key not in ("id", "language")}
    return prompt_text(name, request=draft["request"], language=LANGUAGES[draft["language"]],
                       example=json.dumps(example, ensure_ascii=False, indent=1), **slots)


CONDITION_FORMS = (  # of a reply for one condition, and for one inside another
    ', "condition": {"if": "…", "why": "…"}',
    ', "condition": {"if": "…", "why": "…", "inner": {"if": "…", "why": "…"}}',
)


def rewrite_parts(drafts: list[dict], ask, counts: Counter) -> list[dict]:
    """The drafts with the parts of their exemplar rewritten for the request; a condition has to be true as meant."""

    def write(draft):
        truths = [str(condition["holds"]).lower() for condition in conditions_of(draft["example"])]
        rule = form = ""
        if truths:
            rule = (f"- In place of the example's condition write one on the new request, plainly "
                    f"{' and the inner one '.join(truths)} of it for everyone who reads the request alone, and why.\n")
            form = CONDITION_FORMS[len(truths) - 1]
        return fill_prompt("evolve_rewrite", draft, count=len(draft["example"]["parts"]), condition_rule=rule,
                           condition_form=form)

    def read(draft, reply):
        models, meant = draft["example"]["parts"], conditions_of(draft["example"])
        parts = read_json(reply, "parts")
        written = conditions_of({"condition": read_json(reply, "condition")})[: len(meant)]
        if not has_texts(parts, len(models), "text", "question") or not has_texts(written, len(meant), "if", "why"):
            return None
        made = {"constraints": []}
        for part, model in zip(parts, models, strict=True):
            shape = {name: model[name] for name in ("dimension", "depends_on", "active")}
            made["constraints"].append({"kind": "judge", "question": part["question"], "text": part["text"]} | shape)
        conditions = [{"if": own["if"], "holds": model["holds"], "why": own["why"]}
                      for own, model in zip(written, meant, strict=True)]
        if conditions:
            made["condition"] = conditions[0]
        if conditions[1:]:
            conditions[0]["inner"] = conditions[1]
        return made

    rewritten = ask("rewrite", drafts, write, read, temperature=0.7)
    counts["parts not rewritten"] += rewritten.count(None)
    drafts = [draft | parts for draft, parts in zip(drafts, rewritten, strict=True) if parts]
    pairs = [(draft, condition) for draft in drafts for condition in conditions_of(draft)]
    truths = ask("condition", pairs, lambda pair: fill_prompt("evolve_condition", pair[0], condition=pair[1]["if"]),
                 lambda pair, reply: read_word(reply, "true|false|unclear"))
    wrong = {draft["id"] for (draft, condition), truth in zip(pairs, truths, strict=True)
             if truth != str(condition["holds"]).lower()}
    counts["condition not as meant, or no verdict"] += len(wrong)
    counts["kept"] += len(drafts) - len(wrong)
    return [draft for draft in drafts if draft["id"] not in wrong]


def consistent(draft: dict) -> bool:
    """At least one constraint, and no two active ones of code that the conflict table keeps apart.

    A step of a chain may work on what another step has made, in any way: there the table does not apply.
    """
    ids = [c["id"] for c in active_code(draft)]
    chained = any(c["depends_on"] for c in draft["constraints"])
    return draft["constraints"] != [] and (chained or rewards.compatible(ids))


def check_recorded(row: dict) -> None:
    """Raise InputError `field 'X': …` for what a record may be without, but a recorded row must not get wrong."""
    if row["task"] != "instruction":
        raise InputError(f"field 'task': {row['task']!r}; math goes in by --math FILE")
    for name in ("expert", "witness", "request", "seed", "split"):
        if row.get(name) is None:
            row.pop(name, None)
        elif not filled(row[name]):
            raise InputError(f"field {name!r}: is not a text; write one or remove it")
    condition = row.get("condition")
    if condition is not None and not (isinstance(condition, dict) and filled(condition.get("if"))):
        raise InputError("field 'condition': has no text 'if'; write {\"if\": \"…\", \"holds\": true, \"why\": \"…\"}")
    if row.get("split", "train") not in SPLITS:
        raise InputError(f"field 'split': {row['split']!r} is unknown; use one of {', '.join(SPLITS)}, or leave it out")
    row.setdefault("language", "en")


def wanted_row(row: dict, types: set[str], cfg: Config) -> bool:
    """Do --types, --max-constraints and --answer-words leave the recorded row in?"""
    named = cfg.types in ("ifeval", "all") or {c.get("id") for c in row["constraints"]} <= types
    short = not cfg.answer_words or count_words(parts_of(row)["answer"]) <= cfg.answer_words
    return named and short and len(row["constraints"]) <= (cfg.max_constraints or len(row["constraints"]))


def read_recorded(cfg: Config, counts: Counter) -> list[dict]:
    """Drafts of the recorded teacher's rows: what stands in a row is what a model would reply at that step."""
    names = ("teacher", "rl", "dev", "heldout")
    drafts, first_seen, types = [], {}, set(chosen_types(cfg))
    paths = [data_dir / f"{name}.jsonl" for name in names]
    if cfg.recorded:
        paths = [Path(cfg.recorded)]
    for path in paths:
        rows = []
        for row in rewards.read_records(path):
            try:
                check_recorded(row)
            except InputError as error:
                raise InputError(f"{path}: record {row['id']!r}: {error}") from None
            if row["id"] in first_seen:
                raise InputError(f"{path}: id {row['id']!r} is also in {first_seen[row['id']]}; make it unique")
            first_seen[row["id"]] = path
            if wanted_row(row, types, cfg):
                rows.append(row)
            else:
                counts["not of --types, --max-constraints, --answer-words"] += 1
        for row in rows[: cfg.limit or None]:
            replies = {"merge": json.dumps({"instruction": row["messages"][-1]["content"]})}
            if "expert" in row:
                replies["expert"] = row.pop("expert")
            split = row.get("split") or split_of(row.get("seed", row["id"]))
            if split == "train" and "expert" not in replies:  # nothing to clone
                split = "rl"
            drafts.append({"request": row["messages"][-1]["content"], **row, "split": split, "replies": replies})
    counts["kept"] = len(drafts)
    return drafts


# ---------------------------------------------------------------- step 3: one natural instruction


def list_parts(draft: dict) -> str:
    """The parts that an instruction is merged from, one JSON object a line, conditions last."""
    shown = ("text", "depends_on", "active")
    rows = [{"number": i} | {name: c[name] for name in shown} for i, c in enumerate(draft["constraints"])]
    rows += [{"condition": condition["if"]} for condition in conditions_of(draft)]
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def merge(drafts: list[dict], ask, funnel) -> list[dict]:
    """Request and parts as one instruction; a second look confirms that nothing was added or lost, or it is repeated.

    Three merges are tried. The instruction becomes the draft's `messages`.
    """

    def write(draft):
        return fill_prompt("evolve_merge", draft, parts=list_parts(draft))

    def read(draft, reply):
        text = read_json(reply, "instruction")
        return text.strip() if filled(text) else None

    def write_comparison(draft):
        return fill_prompt("evolve_compare", draft, parts=list_parts(draft),
                           instruction=draft["messages"][-1]["content"])

    pending, compared = drafts, {}
    for turn in range(3):
        texts = ask("merge", pending, write, read, temperature=0.7, seed=turn)
        for draft, text in zip(pending, texts, strict=True):  # earlier turns of a recorded conversation stay
            draft["messages"] = [*draft.get("messages", [])[:-1], {"role": "user", "content": text}]
        written = [draft for draft in pending if draft["messages"][-1]["content"]]
        same = ask("compare", written, write_comparison, lambda draft, reply: read_verdict(reply))
        compared |= {draft["id"]: verdict for draft, verdict in zip(written, same, strict=True)}
        pending = [draft for draft in pending if compared.get(draft["id"]) not in (True, NOT_ASKED)]
        if not pending:
            break
    missing = {draft["id"] for draft in pending}
    funnel["instruction"].update({"kept": len(compared), "not written": len(drafts) - len(compared)})
    tally(funnel["comparison"], compared.values(), "parts lost or added, or no verdict")
    return [draft for draft in drafts if draft["id"] not in missing]


# ---------------------------------------------------------------- step 4: expert answers


def assistant_turn(thought: str, answer: str) -> str:
    return f"<think>\n{thought}\n</think>\n<answer>\n{answer}\n</answer>"


def parse_either(text: str):
    """The parsed turn of either family."""
    return rewards.parse_response(text, "cold" if "<answer>" in text else "warm")


def read_expert(draft: dict, reply) -> tuple[str, str] | None:
    """(thought, answer) of a reply: the thought from the server's reasoning field or from think tags."""
    if reply.reasoning:
        parsed = rewards.parse_response(f"<think></think>{reply.text}")
        think = reply.reasoning.strip()
    else:
        parsed = parse_either(reply.text)
        if not parsed.format_ok:
            return None
        think = parsed.think
    tagged = any(tag in think + parsed.answer for tag in rewards.TAGS["cold"])
    if not parsed.answer or tagged or rewards.is_placeholder(think):
        return None
    return think, parsed.answer


def active_code(draft: dict) -> list[dict]:
    return [c for c in draft["constraints"] if c["kind"] == "code" and c["active"]]


def holds_code(draft: dict, answer: str) -> bool:
    prompt = draft["messages"][-1]["content"]
    return all(rewards.check(c["id"], c["kwargs"], answer, prompt=prompt) for c in active_code(draft))


def add_experts(drafts: list[dict], ask, cfg: Config, funnel) -> list[dict]:
    """The drafts with their shortest expert answer that meets all constraints, by code and by judge.

    A recorded row without an expert is a prompt alone (RL, held-out): its witness, if it has one, is checked instead.
    """
    counts = funnel["expert"]

    def write(draft):
        trigger = prompt_text(f"cot.{draft['language']}")
        return [{"role": "system", "content": trigger}, *draft["messages"]]

    def judge(items):
        questions = [{"asked": item, "replies": {}} for item in items]
        verdicts = ask("judge", questions, lambda question: judge_prompt(*question["asked"]),
                       lambda _, reply: read_verdict(reply), role="judge")
        tally(funnel["judge questions"], verdicts, "no, or unreadable")
        return [verdict in (True, NOT_ASKED) for verdict in verdicts]

    passing: dict[str, list[str]] = {draft["id"]: [] for draft in drafts}
    prompts_alone, readable = set(), set()
    for turn in range(cfg.tries if cfg.llm else 1):
        # Two attempts: these are long replies, and one that ran over the limit would do so again.
        replies = ask("expert", drafts, write, read_expert, role="expert", temperature=cfg.temperature, seed=turn,
                      attempts=2)
        for draft, reply in zip(drafts, replies, strict=True):
            if reply == NOT_ASKED:
                prompts_alone.add(draft["id"])
            elif reply:
                readable.add(draft["id"])
                if holds_code(draft, reply[1]):
                    passing[draft["id"]].append(assistant_turn(*reply))
    for answers in passing.values():
        answers.sort(key=count_words)
    experts: dict[str, str] = {}
    for turn in range(cfg.tries):  # the judge sees the shortest first, a longer one only if that fails
        pending = [d for d in drafts if d["id"] not in experts and len(passing[d["id"]]) > turn]
        answers = [passing[draft["id"]][turn] for draft in pending]
        scores = rewards.score(pending, answers, judge=judge)
        experts |= {d["id"]: a for d, a, s in zip(pending, answers, scores, strict=True) if s.total == 3.0}
    kept = []
    for draft in drafts:
        if draft["id"] in experts:
            counts["kept"] += 1
            kept.append(draft | {"expert": experts[draft["id"]]})
        elif passing[draft["id"]]:
            counts["no answer passed the judge"] += 1
        elif draft["id"] not in prompts_alone:
            known = draft["id"] in readable
            counts["no answer passed the code checks" if known else "no reply with thought and answer"] += 1
        elif "witness" in draft and not holds_code(draft, draft["witness"]):
            counts["its witness fails the checks"] += 1
        else:
            counts[NOT_ASKED] += 1
            kept.append(draft)
    return kept


# ---------------------------------------------------------------- step 5: seven filters

FILTERS = ("language", "leakage", "length", "hallucination", "undefined", "contradiction", "unsafe")
OF_THE_INSTRUCTION = ("undefined", "contradiction", "unsafe")  # these need no answer
_SLOT = re.compile(r"\{\{\w+\}\}|\{(name|topic|text|input|keywords?)\}|[\[<]insert |lorem ipsum", re.I)


def in_another_language(draft: dict, answer: str) -> bool | None:
    """Is the answer in another language than the request? None where code cannot tell."""
    if any(c["id"].startswith(("language", "change_case")) for c in active_code(draft)):  # those ask for another
        return None
    instruction, words = draft["messages"][-1]["content"], tokens(answer)
    share = sum("\u4e00" <= word <= "\u9fff" for word in words) / max(1, len(words))
    if draft["language"] == "zh":
        if share < 0.2:
            return True
        return False if share > 0.9 else None
    if share > 0.5 and not re.search("chinese|mandarin|translat|[\u4e00-\u9fff]", instruction, re.I):
        return True
    return False if share == 0 and rewards.detect_language(answer) == "en" else None


# What code finds of a filter's fault in (draft, answer); what it does not find, the model is asked about.


def leaks_question(draft: dict, answer: str) -> bool:
    """Is the answer a copy of the instruction, or does it hold a judge's question?"""
    words, ids = tokens(answer), [c["id"] for c in active_code(draft)]
    copied = len(words) > 5 and " ".join(words) in " ".join(tokens(draft["messages"][-1]["content"]))
    questions = [c["question"] for c in draft["constraints"] if c["kind"] == "judge"]
    return (copied and "combination:repeat_prompt" not in ids) or any(question in answer for question in questions)


def has_bad_length(draft: dict, answer: str) -> bool:
    return not tokens(answer) or len(answer) > rewards.MAX_CHARS // 2


def has_open_slot(draft: dict, answer: str) -> bool:
    """Does the instruction hold a slot that nobody filled in, or no text to speak of?"""
    instruction = draft["messages"][-1]["content"]
    return bool(_SLOT.search(instruction)) or count_words(instruction) < 3


def contradicts_itself(draft: dict, answer: str) -> bool:
    """Is a word both asked for and forbidden?"""
    wanted, banned = set(), set()
    for c in active_code(draft):
        banned |= {word.lower() for word in c["kwargs"].get("forbidden_words") or []}
        if c["id"] != "keywords:any_of" and c["kwargs"].get("relation") not in ("less than", "at most"):
            for field in {"keywords", "keyword", "first", "second", "word", "first_word"} & c["kwargs"].keys():
                wanted |= {str(word).lower() for word in as_list(c["kwargs"][field])}
    return bool(wanted & banned)


def has_unsafe_term(draft: dict, answer: str) -> bool:
    text = f"{draft['messages'][-1]['content']}\n{answer}".lower()
    terms = (data_dir / "unsafe.txt").read_text("utf-8").splitlines()
    return any(re.search(rf"(?<![a-z]){re.escape(term)}(?![a-z])", text) for term in terms)


FAULTS = {"leakage": leaks_question, "length": has_bad_length, "undefined": has_open_slot,
          "contradiction": contradicts_itself, "unsafe": has_unsafe_term}


def quick_check(name: str, draft: dict, answer: str) -> bool | None:
    """Is the fault of a filter there? True or False where code can tell, None where the model has to be asked."""
    if name == "language":
        return in_another_language(draft, answer)
    if name in FAULTS and FAULTS[name](draft, answer):
        return True
    return None


def apply_filters(drafts: list[dict], ask, folder: Path, funnel) -> list[dict]:
    """The drafts in which no filter finds its fault; each sees what the ones before it have left."""
    reasons = {True: "found by code", "true": "found by the model", None: "no verdict"}
    outcomes = reasons | {NOT_ASKED: NOT_ASKED}
    answers = {draft["id"]: rewards.parse_response(draft.get("expert", "")).answer for draft in drafts}
    for name in FILTERS:

        def write(draft, name=name):
            instruction, answer = draft["messages"][-1]["content"], answers[draft["id"]] or "(none yet)"
            return prompt_text("filter", instruction=instruction, answer=answer, rubric=prompt_text(f"filter_{name}"))

        verdicts = dict.fromkeys(answers, NOT_ASKED)  # without an answer there is nothing to ask about it
        for draft in drafts:
            if answers[draft["id"]] or name in OF_THE_INSTRUCTION:
                verdicts[draft["id"]] = quick_check(name, draft, answers[draft["id"]])
        unclear = [draft for draft in drafts if verdicts[draft["id"]] is None]
        replies = ask(f"filter {name}", unclear, write, lambda draft, reply: read_word(reply, "true|false|na"))
        verdicts |= {draft["id"]: reply for draft, reply in zip(unclear, replies, strict=True)}
        keep(folder, f"filter-{name}", [{"id": draft["id"], "verdict": verdicts[draft["id"]]} for draft in drafts])
        for draft in drafts:
            funnel[f"filter: {name}"][outcomes.get(verdicts[draft["id"]], "kept")] += 1
        drafts = [draft for draft in drafts if verdicts[draft["id"]] not in reasons]
    return drafts


# ---------------------------------------------------------------- step 6: files and report


def math_records(source: str) -> list[dict]:
    """Math records: the file's own, or made of DeepScaleR (problem, answer), GSM8K (#### result) or MATH rows."""
    records = []
    for where, row in rows_of(source):
        if "task" in row:
            own = rewards.read_records(source)
            others = [record["id"] for record in own if record["task"] != "math"]
            if others:
                raise InputError(f"{source}: record {others[0]!r} is no math record; give a file of math records alone")
            return own
        question, answer = row.get("problem", row.get("question")), str(row.get("answer") or "")
        answer = answer.rpartition("####")[2].strip() or rewards.last_boxed(str(row.get("solution") or ""))
        if not filled(question) or not answer:
            raise InputError(f"{where}: fields 'problem', 'answer': missing; give rows of DeepScaleR, GSM8K or MATH")
        language = language_of(question) or "en"
        request = "请把结果写在 \\boxed{} 里。" if language == "zh" else "Put the result in \\boxed{}."
        answer = answer.replace(",", "") if "####" in str(row.get("answer")) else answer
        name, messages = Path(source).stem, [{"role": "user", "content": f"{question.strip()} {request}"}]
        records.append({"id": f"{name}-{len(records) + 1:06d}", "source": name, "task": "math", "language": language,
                        "messages": messages, "answer": answer})
    return records


def mix_in_math(files: dict[str, list[dict]], math: list[dict], cfg: Config, rng) -> None:
    """Add math to the prompts of GRPO and, where it comes with expert answers, other math to the experts."""
    rng.shuffle(math)
    used = 0
    for split in ("rl", "train"):
        wanted = round(cfg.math_ratio * len(files[split]))
        usable = [record for record in math[used:] if split == "rl" or "expert" in record][:wanted]
        if wanted > len(usable):
            print(f"--math-ratio {cfg.math_ratio} asks for {wanted} math records in {split}.jsonl, there are "
                  f"{len(usable)}: all taken", file=sys.stderr)
        files[split] += usable
        used += len(usable)


_USER_TURNS = (  # of the chat templates of Qwen and SmolLM, DeepSeek, LLaMA 3, Mistral
    r"<\|im_start\|>user\n(.*?)<\|im_end\|>",
    r"<｜User｜>(.*?)<｜Assistant｜>",
    r"<\|start_header_id\|>user<\|end_header_id\|>\s*(.*?)<\|eot_id\|>",
    r"\[INST\](.*?)\[/INST\]",
)


def user_text(rendered: str) -> str:
    """The last user turn of a prompt that a chat template has rendered."""
    turns = [rendered]
    for pattern in _USER_TURNS:
        turns += re.findall(pattern, rendered, re.S)
    return turns[-1].strip()


def raif_target(record: dict, task: str, target) -> None:
    """Fill in the answer or the constraints that a released row's `task` and `target` stand for."""
    whole = {"en": "Does the reply do all that is asked?", "zh": "回答是否满足了指令的全部要求？"}
    if task == "sft":  # an answer without its RL row gets one question about the whole instruction
        target = {"scoring_questions": [whole[record["language"]]]}
    elif not task.startswith(("ifeval", "complex")):
        record |= {"task": "math", "answer": str(target)}
        return
    elif isinstance(target, str):
        target = json.loads(target)
    if task.startswith("ifeval"):
        constraints = []
        for name, kwargs in zip(target["instruction_id_list"], target["kwargs"], strict=True):
            given = {key: value for key, value in (kwargs or {}).items() if value is not None}
            constraints.append({"kind": "code", "id": name, "text": name, "kwargs": given})
    else:
        constraints = [{"kind": "judge", "question": text, "text": text} for text in target["scoring_questions"]]
    record["constraints"] = constraints


def raif_records(sources: str, counts: Counter) -> list[dict]:
    """Records of the released RAIF files: RL rows {input, task, target}, SFT rows {question, answer}.

    A task "ifeval…" has code constraints, "complex…" judge questions, any other is math. An SFT answer becomes the
    expert of the RL row with the same request.
    """
    rows, experts, records = [], {}, []
    for where, row in chain.from_iterable(map(rows_of, sources.split(","))):
        if {"input", "task", "target"} <= row.keys():
            rows.append((where, row["task"], user_text(row["input"]), row["target"]))
        elif filled(row.get("question")) and filled(row.get("answer")):
            answer = row["answer"]
            if re.search(r"<think>\s*$", row["question"]) and "<think>" not in answer:
                answer = "<think>" + answer
            parsed = parse_either(answer)
            if parsed.format_ok:
                answer = assistant_turn(parsed.think, parsed.answer)
            experts[user_text(row["question"])] = (where, answer)
        else:
            raise InputError(f"{where}: neither an RL row (input, task, target) nor an SFT row (question, answer)")
    known = {text for _, _, text, _ in rows}
    rows += [(where, "sft", text, None) for text, (where, _) in experts.items() if text not in known]
    for where, task, text, target in rows:
        record = {"id": f"raif-{len(records) + 1:06d}", "source": "raif", "task": "instruction",
                  "language": language_of(text) or "en", "messages": [{"role": "user", "content": text}]}
        if text in experts:
            record["expert"] = experts[text][1]
        try:
            raif_target(record, task, target)
            unknown = {c["id"] for c in record.get("constraints", []) if "id" in c} - set(rewards.CHECKS)
            if unknown:
                counts[f"dropped: unknown constraint {min(unknown)}"] += 1
                continue
            rewards.validate_record(record)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{where}: field 'target': {error!r}; not of the released form") from None
        counts[f"kept: {task}"] += 1
        records.append(record)
    return records


def finished(draft: dict) -> dict:
    """The record of a draft: what only the way here needed is left out."""
    record = {name: value for name, value in draft.items() if name not in ("replies", "example")}
    if draft["split"] == "heldout":
        record["ood"] = any(c.get("id") in OOD_TYPES for c in draft["constraints"])
    return record


def write_files(folder: Path, files: dict[str, list[dict]]) -> None:
    """SPLIT.jsonl of each split that has records."""
    for split, records in files.items():
        if records:
            write_jsonl(folder / f"{split}.jsonl", records)
            rewards.read_records(folder / f"{split}.jsonl")  # through the validation of the next stages


def remove_earlier(folder: Path) -> None:
    """What an earlier run has left, but for its finished calls: nothing of it may pass for this run's."""
    names = [f"{split}.jsonl" for split in SPLITS] + ["report.md", "metrics.jsonl", "contaminated.jsonl"]
    for path in [*(folder / name for name in names), *(folder / "steps").glob("*")]:
        path.unlink(missing_ok=True)


def parts_of(record: dict) -> dict[str, str]:
    parsed = rewards.parse_response(record.get("expert", ""))
    return {"instruction": record["messages"][-1]["content"], "thought": parsed.think, "answer": parsed.answer}


def report(funnel, files: dict[str, list[dict]], spent) -> str:
    """report.md: what each step kept and dropped, the files, tokens, and records per type, composition, language."""
    files = {split: [r for r in records if r["task"] == "instruction"] for split, records in files.items()}
    steps = []
    for step, counts in funnel.items():
        dropped = {reason: n for reason, n in sorted(counts.items()) if reason not in ("kept", NOT_ASKED) and n}
        reasons = ", ".join(f"{reason} {n}" for reason, n in dropped.items()) or "-"
        steps.append((step, counts.total(), counts["kept"], counts[NOT_ASKED], reasons))
    lines = ["# Instruction evolution\n", "## Funnel\n",
             markdown_table(("step", "in", "passed", NOT_ASKED, "dropped"), steps), "## Files\n"]
    rows = []
    for split, records in files.items():
        sizes = Counter(sum(c["active"] for c in r["constraints"]) for r in records)
        words = []
        for name in ("instruction", "thought", "answer"):
            lengths = [count_words(parts_of(r)[name]) for r in records if parts_of(r)[name]]
            words.append(f"{mean(lengths):.0f}" if lengths else "-")
        with_n = ", ".join(str(sizes[n]) for n in range(1, max(sizes, default=0) + 1))
        rows.append((split, len(records), with_n, *words))
    header = ("file", "instructions", "with 1, 2, 3 … constraints", "words: instruction", "thought", "answer")
    lines += [markdown_table(header, rows)]
    if spent:
        numbers = ("calls", "refused", "cut", "prompt_tokens", "completion_tokens")
        rows = [(step, *(counts[name] for name in numbers)) for step, counts in spent.items()]
        rows.append(("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
        header = ("step", "calls", "refused", "cut at --max-tokens", "prompt tokens", "tokens written")
        lines += ["## Tokens\n", markdown_table(header, rows)]
    values = {
        "type": lambda r: {c.get("id", "judge") for c in r["constraints"]},
        "composition and language": lambda r: {f"{r.get('composition', 'and')}, {r['language']}"},
    }
    for name, value_of in values.items():
        counts = {split: Counter(x for r in records for x in value_of(r)) for split, records in files.items()}
        present = sorted(set().union(*counts.values()))
        rows = [(value, *(counts[split][value] for split in files)) for value in present]
        lines += [f"## Records per {name}\n", markdown_table((name, *files), rows)]
    return "\n".join(lines)


def show_steps(folder: Path, drafts: list[dict]) -> None:
    """What each step made of each request, for reading."""
    paths = sorted((folder / "steps").glob("*.jsonl"), key=lambda path: int(path.name.partition("-")[0]))
    rows = [(path.stem, row) for path in paths for row in read_jsonl(path)]
    for draft in drafts:
        print(f"\n{'=' * 100}\n{draft['id']}")
        for step, row in rows:
            if row["id"] == draft["id"]:
                print(f"\n[{step}]", json.dumps(row, ensure_ascii=False, indent=1).replace("\\n", "\n    "))


def check_settings(cfg: Config) -> None:
    if cfg.seeds and not cfg.llm:
        raise InputError("--seeds: requests need a model that writes constraints and answers: give --llm NAME@URL (a "
                         "served one) or --llm NAME (loaded here). Rows that have instruction, constraints and expert "
                         "already go in by --recorded FILE")
    if (cfg.expert or cfg.judge) and not cfg.llm:
        raise InputError("--expert, --judge: the recorded teacher asks nobody; give --llm as well")
    least = {"tries": 1, "concurrency": 1, "max_tokens": 1}
    for name in ("limit", "dry_run", "max_constraints", "answer_words", "tries", "max_tokens", "concurrency", "rows",
                 "seed_words", "ability_cap", "math_ratio"):
        if getattr(cfg, name) < least.get(name, 0):
            raise InputError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be at least {least.get(name, 0)}")
    if not 0 <= cfg.judge_share <= 1:
        raise InputError(f"--judge-share {cfg.judge_share}: is a share from 0 to 1")
    if cfg.raif and (cfg.llm or cfg.seeds or cfg.recorded or cfg.dry_run):
        raise InputError("--raif: only turns files into records; leave --llm, --seeds, --recorded and --dry-run out")
    if cfg.recorded and cfg.llm:
        raise InputError("--recorded, --llm: either rows that are finished or a model that writes them; give one")


def convert_raif(cfg: Config, folder: Path, counts: Counter) -> None:
    """train.jsonl and rl.jsonl of the released RAIF files, as they stand."""
    records = raif_records(cfg.raif, counts)
    if is_main():
        write_files(folder, {"train": [record for record in records if "expert" in record], "rl": records})
        print(markdown_table(("rows", "number"), sorted(counts.items())))


def write_results(drafts, known, hits, cfg: Config, folder: Path, funnel, spent) -> list[dict]:
    """The files of the splits, with math, and the report; -> the records that share nothing with a benchmark."""
    records, listed = [finished(draft) for draft in drafts], len(hits)
    clean = drop_contaminated(records, known, hits)
    math = []
    if cfg.math_ratio:
        math = math_records(cfg.math or str(data_dir / "arithmetic.jsonl"))
    if known:
        funnel["contamination"].update({"kept": len(clean), "in a benchmark": len(hits) - listed})
        math = drop_contaminated(math, known, hits)
        write_jsonl(folder / "contaminated.jsonl", hits)
    files = {split: [record for record in clean if record["split"] == split] for split in SPLITS}
    if not files["rl"]:  # as in the paper, GRPO's prompts are then those of the experts
        files["rl"] = [{k: v for k, v in r.items() if k != "expert"} | {"split": "rl"} for r in files["train"]]
    rng = random.Random(cfg.seed)
    mix_in_math(files, math, cfg, rng)
    for split in ("train", "rl"):
        rng.shuffle(files[split])
    write_files(folder, files)
    write_jsonl(folder / "metrics.jsonl", [{"step": i, "name": name, **funnel[name]} for i, name in enumerate(funnel)])
    write_atomic(folder / "report.md", report(funnel, files, spent))
    print((folder / "report.md").read_text("utf-8"))
    return clean


def main(argv=None):
    cfg = parse_flags(Config, argv, PRESETS)
    check_settings(cfg)
    rank, _ = init_distributed()
    if cfg.dry_run:
        cfg = replace(cfg, limit=cfg.dry_run, out=str(Path(cfg.out) / "dry-run"))
    folder = open_run(cfg.out, cfg, resume=True)
    funnel, spent, hits = defaultdict(Counter), defaultdict(Counter), []
    if rank == 0:
        remove_earlier(folder)
    if cfg.raif:
        return convert_raif(cfg, folder, funnel["rows"])

    # Requests with constraints: planned for a model, or as they stand in the recorded teacher's rows.
    known = read_benchmarks(cfg.benchmark_dir)
    if cfg.llm:
        ask = make_ask(cfg, folder, spent)
        seeds = drop_duplicates(read_seeds(cfg, funnel["requests"]), funnel["requests"])
        seeds = drop_contaminated(seeds, known, hits)
        if hits:
            funnel["requests"]["in a benchmark"] = len(hits)
        seeds.sort(key=lambda s: hashlib.sha256(f"{cfg.seed}/order/{s['id']}".encode()).digest())
        seeds = choose(seeds, ask, cfg, funnel["requests"])
        keep(folder, "requests", seeds)
        planned = plan_drafts(seeds, ask, cfg, funnel)
    else:
        ask = ask_recorded
        seeds = planned = read_recorded(cfg, funnel["recorded rows"])[: cfg.dry_run or None]
    tally(funnel["constraints"], map(consistent, planned), "none fits, or they conflict")
    drafts = [draft for draft in planned if consistent(draft)]
    keep(folder, "constraints", [finished(draft) for draft in drafts])

    # Instruction, expert answer, filters: the same whoever answers.
    drafts = merge(drafts, ask, funnel)
    keep(folder, "instruction", [finished(draft) for draft in drafts])
    drafts = add_experts(drafts, ask, cfg, funnel)
    keep(folder, "expert", [finished(draft) for draft in drafts])
    drafts = apply_filters(drafts, ask, folder, funnel)
    if rank:
        return
    if cfg.dry_run:
        show_steps(folder, seeds)
        return print(report(funnel, {split: [] for split in SPLITS}, spent).partition("## Files")[0])

    clean = write_results(drafts, known, hits, cfg, folder, funnel, spent)
    if not clean:
        raise InputError(f"{cfg.llm or 'the recorded teacher'}: of {len(planned)} planned records none came through; "
                         f"the funnel in {folder / 'report.md'} shows where they were lost. Tagging, rewriting and "
                         "merging take an instruct model of some billion parameters: give --llm a larger one")


if __name__ == "__main__":
    launch(main)
