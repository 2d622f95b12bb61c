"""Stage 1: plain requests become checked instructions with constraints, each with an expert answer that meets them all.

    python evolve.py                        520 shipped requests -> runs/evolve/{train,heldout}.jsonl, report (English,
                                            eight kinds); runs/evolve/complete: Chinese too, 64 kinds, four compositions
    python evolve.py --limit 40 --out /tmp/e   a quick look; --dry-run 5 prints what each step makes of five requests
    python evolve.py --llm Qwen/Qwen2.5-72B-Instruct --llm-url http://localhost:8000/v1 --seeds allenai/WildChat \\
        --language both --kinds ifeval --compositions all --limit 10000 --benchmark-dir benchmarks

One step after the other: seeds -> drafts -> compatible constraints with arguments that fit the draft -> one natural
instruction -> expert answer -> checks -> train and held-out files. The offline expert is *draft and repair*: the local
model answers the plain request, each constraint's `repair` edits that draft until every checker passes, and a thought
that works through the constraints is put in front. With a served model (--llm) half of the requests get constraints
that a judge verifies, rewritten from data/exemplars.jsonl; experts are sampled, and seven filters follow. What fails
is dropped and counted, never kept. Held-out records have other requests and other wordings than training; some have
kinds never trained on (OOD). The prompts are files in data/prompts/.
"""

import hashlib
import json
import random
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Literal

from tqdm import tqdm

import rewards
from model import (
    Endpoint,
    compute_dtype,
    data_dir,
    gather_objects,
    init_distributed,
    launch,
    load_model,
    make_engine,
    open_run,
    parse_flags,
    prompt_text,
    pyplot,
    read_jsonl,
    record_seed,
    render_prompt,
    write_atomic,
    write_jsonl,
)
from rewards import CONSTRAINTS, InputError

LAPTOP_KINDS = (  # few enough for a 135M model to learn from some 250 answers; --kinds trains on more
    "detectable_content:postscript",
    "detectable_format:number_bullet_lists",
    "detectable_format:number_highlighted_sections",
    "detectable_format:json_format",
    "detectable_format:title",
    "startend:end_checker",
    "change_case:english_lowercase",
    "punctuation:no_comma",
)
OOD_KINDS = (  # never in train.jsonl: what is learned about the other kinds has to carry over to these
    "keywords:frequency",
    "keywords:letter_frequency",
    "length_constraints:number_sentences",
    "length_constraints:number_words",
    "detectable_format:multiple_sections",
    "change_case:english_capital",
    "change_case:capital_word_frequency",
)
IDLE_KINDS = ("language:response_language",)  # an answer is in the language of its request anyway: only --kinds all
COMPOSITIONS = ("and", "chain", "selection", "nested")


@dataclass
class Config:
    seeds: str = ""  # requests: own, record, Alpaca or WildChat rows (JSONL, JSON, Parquet) or a hub data set's name
    kinds: Literal["laptop", "ifeval", "all"] = "laptop"  # kinds trained on: eight of the 25 of IFEval, those, or all
    language: Literal["en", "zh", "both"] = "en"  # language of the requests
    rows: int = 0  # read only the first so many rows of --seeds, for data sets of the hub; 0 = all
    seed_words: int = 300  # longest request, in words (1.6 characters a word in Chinese); the shortest has 3
    ability_cap: int = 0  # most requests of one ability; 0 = no cap
    benchmark_dir: str = ""  # folder of benchmark files; requests and records that overlap with them are dropped
    ngram: int = 13  # words (Chinese: characters) in a row that make an overlap
    raif: str = ""  # copies of the released RAIF files, comma-separated: turned into train.jsonl, nothing else is done
    math: str = ""  # file of math records, or of DeepScaleR, GSM8K or MATH rows (default: the shipped arithmetic)
    math_ratio: float = 0.1  # math records per instruction record in train.jsonl; the held-out file has none
    model: str = "smollm2-135m"  # writes the drafts: smollm2-135m, a local folder or a hub name
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # arithmetic of the drafts
    draft_tokens: int = 64  # longest draft, in tokens
    draft_words: int = 32  # drafts are cut after the last complete sentence within so many words
    temperature: float = 0.0  # of the drafts; 0 is greedy
    weight_1: float = 0.55  # weight of instructions with one constraint
    weight_2: float = 0.3  # … with two
    weight_3: float = 0.15  # … with three
    weight_4: float = 0.0  # … with four
    weight_5: float = 0.0  # … with five
    compositions: Literal["and", "all"] = "and"  # all: And, Chain, Selection and Nested in equal parts
    keep_easy: float = 0.5  # chance of keeping a constraint that the plain draft already meets
    heldout_share: float = 0.3  # share of the requests that only the held-out file may use
    uses: int = 1  # offline: training records per request
    heldout: int = 200  # offline: held-out records of the trained kinds (with --llm: all of the held-out requests)
    ood: int = 100  # offline: held-out records with at least one kind never trained on
    max_words: int = 80  # offline: longest expert answer, in words (1.6 characters a word in Chinese)
    limit: int = 0  # use only so many requests; 0 = all
    llm: str = ""  # model that tags, drafts, writes and filters (name as served); none: all offline
    llm_url: str = ""  # its OpenAI-compatible server, such as http://localhost:8000/v1 (key: OPENAI_API_KEY)
    expert: str = ""  # model that answers (default: --llm), or "repair": edited drafts, code constraints only
    expert_url: str = ""  # its server (default: --llm-url)
    judge: str = ""  # model that checks answers against judge constraints (default: --llm)
    judge_url: str = ""  # its server (default: --llm-url)
    judge_share: float = 0.5  # share of the requests that get judge-verified constraints; the others code-verified
    tries: int = 3  # expert answers per instruction; the shortest that passes is kept
    expert_temperature: float = 0.6  # of the expert answers
    max_tokens: int = 4096  # longest reply of a served model; a longer one counts as none
    concurrency: int = 16  # requests under way at a time
    price_in: float = 0.0  # cost of a million prompt tokens, for the report
    price_out: float = 0.0  # … of a million tokens written
    dry_run: int = 0  # take so many requests through all steps, print what each step made, write no training files
    seed: int = 0  # everything random follows from it
    out: str = "runs/evolve"  # folder of the results; drafts found there are used again
    complete: bool = True  # from the shipped requests, also OUT/complete: every kind, composition and language


# ---------------------------------------------------------------- step 1: seeds


def filled(value) -> bool:
    return isinstance(value, str) and value.strip() != ""


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
        rows = (row for batch in batches for row in batch.to_pylist())
    elif path.suffix == ".json" and path.exists():
        try:
            value = json.loads(path.read_text("utf-8-sig"))
        except ValueError:  # not one value: one object a line
            value = [row for _, row in rewards.json_lines(path)]
        rows = value if isinstance(value, list) else [value]
    else:
        rows = (row for _, row in rewards.json_lines(path))
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{source}:{number}: not a JSON object; one object per line is expected")
        yield f"{source}:{number}", row


_OTHER_FORMS = ("messages", "conversation", "conversations", "instruction", "prompt")


def request_of(row: dict):
    """The first user turn of a chat, or the instruction with its input (Alpaca, self-instruct), or the prompt."""
    for turns in filter(None, map(row.get, _OTHER_FORMS[:3])):
        users = [turn for turn in turns if turn.get("role", turn.get("from")) in ("user", "human")]
        return users[0].get("content", users[0].get("value")) if users else None
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


def read_seeds(cfg: Config, counts: Counter | None = None) -> list[dict]:
    """The plain requests: id, language, topic, ability, text; a Chinese one has a draft unless a model is served.

    Rows of this form are checked line by line. Of rows of another form the first user turn is taken; what cannot be
    used of those is counted.
    """
    counts = Counter() if counts is None else counts
    files = {"en": [data_dir / "seeds.jsonl"], "zh": [data_dir / "seeds_zh.jsonl"]}
    files["both"] = files["en"] + files["zh"]
    forms = [data_dir / "seeds_forms.jsonl"] if cfg.kinds == "all" else []  # drafts with lists, digits, questions …
    seeds, first_seen = [], {}
    for source in [cfg.seeds] if cfg.seeds else files[cfg.language] + forms:
        for where, row in islice(rows_of(str(source)), cfg.rows or None):
            if row.keys() & set(_OTHER_FORMS) and not row.keys() >= {"text", "language"}:
                try:
                    text = request_of(row)
                except (AttributeError, IndexError, TypeError):
                    text = None
                if not filled(text) and not Path(source).exists():  # of the hub: nobody can mend it
                    counts["no text"] += 1
                    continue
                if not filled(text):
                    raise InputError(f"{where}: no text of a user turn, instruction or prompt; mend or remove the line")
                seed = {"id": f"{Path(source).stem}-{where.rpartition(':')[2]}", "text": text.strip()}
                seed["language"] = language_of(text)
                useless = {"toxic": row.get("toxic"), "other language": not seed["language"],
                           "Chinese, and no model to answer it": seed["language"] == "zh" and not cfg.llm}
                if any(useless.values()):
                    counts[next(reason for reason, found in useless.items() if found)] += 1
                    continue
            else:
                seed = row
                if seed.get("language") not in ("en", "zh"):
                    raise InputError(f"{where}: field 'language': {seed.get('language')!r} is unknown; use en or zh")
                for field in ["id", "text"] + (["draft"] if seed["language"] == "zh" and not cfg.llm else []):
                    if not filled(seed.get(field)):
                        raise InputError(f"{where}: field '{field}': missing or empty; give it a text")
            if seed["id"] in first_seen:
                raise InputError(
                    f"{where}: field 'id': {seed['id']!r} is that of {first_seen[seed['id']]}; make it unique"
                )
            first_seen[seed["id"]] = where
            length = count_words(seed["text"]) / (1.6 if seed["language"] == "zh" else 1)
            if not 3 <= length <= cfg.seed_words:
                counts["too short" if length < 3 else "too long"] += 1
            elif cfg.language in (seed["language"], "both"):
                seeds.append(seed)
            else:
                counts["not in --language"] += 1
    if not seeds:
        dropped = ", ".join(f"{reason} {n}" for reason, n in counts.items())
        raise InputError(f"{cfg.seeds or 'the shipped requests'}: none is usable ({dropped or 'no rows'}); change "
                         "--language, --seed-words or the file")
    return seeds


def tokens(text: str) -> list[str]:
    """Words in lower case, each Chinese character one: the unit of near-duplicates and of contamination."""
    return re.findall(r"[a-z0-9']+|[\u4e00-\u9fff]", text.lower())


def shingles(text: str) -> set:
    """Sets of three neighbouring words (three characters in Chinese), the unit of near-duplicate search."""
    words = tokens(text)
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def drop_duplicates(seeds: list[dict], funnel, threshold=0.5) -> list[dict]:
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
        else:
            funnel["requests"]["exact duplicate" if overlap == 1 else "near duplicate"] += 1
    return kept


def strings(value):
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(inner)


def grams(text: str, n: int):
    """The runs of n words; of a shorter text all its words, if they are at least six."""
    words = tokens(text)
    return (tuple(words[i : i + n]) for i in range(max(len(words) >= 6, len(words) - n + 1)))


def read_benchmarks(cfg: Config) -> dict[int, str]:
    """Hash of each run of --ngram words in any text of any file under --benchmark-dir -> name of the file."""
    if not cfg.benchmark_dir:
        return {}
    files = sorted(p for p in Path(cfg.benchmark_dir).rglob("*") if p.suffix in (".json", ".jsonl", ".parquet"))
    if not files:
        raise InputError(f"{cfg.benchmark_dir}: holds no .json, .jsonl or .parquet file; give the benchmarks' folder")
    known: dict[int, str] = {}
    for path in files:
        for _, row in rows_of(str(path)):
            for text in strings(row):
                known |= {hash(gram): str(path.relative_to(cfg.benchmark_dir)) for gram in grams(text, cfg.ngram)}
    return known


def drop_contaminated(rows: list[dict], known: dict[int, str], cfg: Config, hits: list[dict]) -> list[dict]:
    """The rows (requests or records) that share no run of words with a benchmark; the others are listed in hits."""
    clean = []
    for row in rows:
        text = row["messages"][0]["content"] if "messages" in row else row["text"]
        gram = next((gram for gram in grams(text, cfg.ngram) if hash(gram) in known), None) if known else None
        if gram is None:
            clean.append(row)
        else:
            hits.append({"id": row["id"], "file": known[hash(gram)], "overlap": " ".join(gram), "text": text})
    return clean


def tag(seeds: list[dict], ask, counts: Counter) -> list[dict]:
    """The requests with ability and topic group: their own, the model's, or offline by the first keyword found.

    The paper keeps four topic groups; a request that the model puts in none of them is dropped.
    """
    topics = json.loads((data_dir / "abilities.json").read_text("utf-8"))
    untagged = [seed for seed in seeds if not seed.get("ability")]
    if ask:
        shown = "\n".join(f"- {topic}: {', '.join(abilities)}" for topic, abilities in topics.items())

        def read(seed, reply):
            topic, ability = str(read_json(reply, "topic")), read_json(reply, "ability")
            return (topic, str(ability)) if topic in topics else ("", "") if topic == "other" else None

        found = ask("tag", untagged, lambda s: prompt_text("evolve_tag", abilities=shown, request=s["text"]), read)
    else:
        named = [(t, a, words) for t, abilities in topics.items() for a, words in abilities.items()]
        found = [
            next(((t, a) for t, a, words in named  # words begin where a word begins, in the instruction itself
                  if any(re.search(f"(?<![a-z]){w}", seed["text"].partition("\n\n")[0].lower()) for w in words)),
                 ("", "other"))
            for seed in untagged
        ]
    tags = {seed["id"]: pair for seed, pair in zip(untagged, found, strict=True)}
    counts["no tag"] += found.count(None)
    counts["other topic"] += found.count(("", ""))
    tagged = (seed | dict(zip(("topic", "ability"), tags.get(seed["id"], ()) or (), strict=False)) for seed in seeds)
    return [seed for seed in tagged if seed.get("ability")]


def choose(seeds: list[dict], ask, cfg: Config, counts: Counter) -> list[dict]:
    """--limit requests with tags, at most --ability-cap of each ability; tagged in parts, so that few are in vain."""
    chosen, per_ability, size = [], Counter(), min(512, max(16, 2 * cfg.limit)) if cfg.limit else 512
    parts = (tag(seeds[start : start + size], ask, counts) for start in range(0, len(seeds), size))
    for seed in (seed for part in parts for seed in part):
        per_ability[seed["ability"]] += 1
        if cfg.ability_cap and per_ability[seed["ability"]] > cfg.ability_cap:
            counts["over the cap of its ability"] += 1
        else:
            chosen.append(seed)
        if len(chosen) == cfg.limit:
            break
    counts["kept"] = len(chosen)
    return chosen


def is_heldout(seed_id: str, cfg: Config) -> bool:
    """By hash, so that adding requests never moves an old one to the other side."""
    digest = hashlib.sha256(f"{cfg.seed}/{seed_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < cfg.heldout_share


# ---------------------------------------------------------------- step 2: drafts

CHUNK = 64  # drafts per batch; a chunk is stored when it is complete


def local_generator(cfg: Config):
    """The local model as a function: requests (texts), seeds -> answers (texts)."""
    dtype = compute_dtype(cfg.precision)
    model, tokenizer = load_model(cfg.model, dtype=dtype)
    engine = make_engine("hf", model, tokenizer, dtype=dtype)

    def generate(requests, seeds):
        prompts = [render_prompt(tokenizer, [{"role": "user", "content": text}], "io").ids for text in requests]
        done = engine.generate(prompts, n=1, max_tokens=cfg.draft_tokens, temperature=cfg.temperature, seeds=seeds)
        return [completions[0].text for completions in done]

    return generate


def write_drafts(seeds: list[dict], cfg: Config, folder: Path) -> dict[str, str]:
    """Seed id -> the local model's whole answer to the plain request; a request that brings a draft keeps it.

    The ranks of torchrun share each chunk. Chunks finished by an earlier run are read from drafts.jsonl. A chunk's key
    covers all that shapes its texts (in bf16 the neighbours in the batch too), so that a resumed run and an
    uninterrupted one write the same files.
    """
    pending = sorted((s for s in seeds if not s.get("draft")), key=lambda s: (len(s["text"]), s["id"]))
    drafts = {s["id"]: s["draft"] for s in seeds if s.get("draft")}
    cache = {row["key"]: row for row in read_jsonl(folder / "drafts.jsonl")}
    generate, (rank, world) = None, init_distributed()
    for start in tqdm(range(0, len(pending), CHUNK), desc="drafts", unit="chunk", disable=not pending or rank > 0):
        chunk = pending[start : start + CHUNK]
        settings = [cfg.model, cfg.precision, cfg.draft_tokens, cfg.temperature, cfg.seed, world,
                    [(s["id"], s["text"]) for s in chunk]]
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        if key not in cache:
            generate = generate or local_generator(cfg)
            own = chunk[rank::world]
            texts = generate([s["text"] for s in own], [record_seed(cfg.seed, 0, s["id"]) for s in own]) if own else []
            written = dict(gather_objects([(s["id"], text) for s, text in zip(own, texts, strict=True)]))
            cache[key] = {"key": key, "drafts": {s["id"]: written[s["id"]] for s in chunk}}
            if rank == 0:
                write_jsonl(folder / "drafts.jsonl", cache.values())
        drafts |= cache[key]["drafts"]
    return drafts


_SENTENCE = re.compile(r"\S.*?(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)[.!?][\"”’]?(?=\s|$)")
_DEBRIS = re.compile(r"^\s*([-*#>•]|\d+[.)])\s|\*\*|[\[\]{}<>_#|`]|https?:", re.M)
_CHATTER = re.compile(
    r"\b(ai|language model|chatbot|assistant|hugging face|i'm (sorry|unable|here to|happy to|not (able|equipped|sure))|"
    r"i am (sorry|unable|here to)|i can(not|'t| help| assist| provide))\b",
    re.I,
)
_LOOP = re.compile(r"\b(\w+)[ ,]+(and |or )?\1\b", re.I)  # "clients, clients", "cunning and cunning"


def cut_draft(text: str, language: str, max_words: int) -> tuple[str | None, str]:
    """(usable draft or None, why not): the complete sentences within `max_words`, free of lists, markup and loops."""
    if language == "zh":
        return text.strip(), ""
    found = _DEBRIS.search(text)
    text = text[: found.start()] if found else text
    sentences, words = [], 0
    for sentence in _SENTENCE.findall(" ".join(text.split())):
        words += len(sentence.split())
        if words > max_words:
            break
        sentences.append(sentence)
    draft = " ".join(sentences)
    tokens = draft.lower().split()
    if len(tokens) < 8:
        return None, "list or markup" if found else "no complete sentence"
    if _CHATTER.search(draft):
        return None, "talks about itself"
    if _LOOP.search(draft) or len(shingles(draft)) < 0.9 * (len(tokens) - 2) or len(set(tokens)) < 0.5 * len(tokens):
        return None, "repeats itself"
    return (draft.replace('"', "") if draft.count('"') % 2 else draft), ""


# ---------------------------------------------------------------- step 3: constraints


def draw_constraints(rng, seed: dict, kinds, first, tried: Counter, cfg: Config, least=1) -> list[tuple[str, dict]]:
    """1 to 5 compatible (id, kwargs) with arguments that fit the draft, or [] if fewer than `least` fit.

    Kinds tried least so far come first (tries are counted, so a kind that rarely fits is not forced); where `first` is
    given, one of its kinds is in.
    """
    weights = (cfg.weight_1, cfg.weight_2, cfg.weight_3, cfg.weight_4, cfg.weight_5)
    wanted = max(least, rng.choices((1, 2, 3, 4, 5), weights)[0])
    chosen: list[tuple[str, dict]] = []
    for pool, count in ((first, 1 if first else 0), (kinds, wanted)):
        for kind in sorted(pool, key=lambda kind: tried[kind] + 3 * rng.random()):
            if kind == "length_constraints:number_sentences" and "sentence" in seed["text"]:
                continue  # the request itself says how many
            if "<" in seed["text"] and re.search("case|xml|html", kind):
                continue  # it asks for <tags> as they are
            if len(chosen) < count and rewards.compatible([kind, *(other for other, _ in chosen)]):
                tried[kind] += 1
                kwargs = draw_kwargs(rng, kind, seed, cfg.keep_easy)
                if kwargs is not None:
                    chosen.append((kind, kwargs))
        if len(chosen) < min(count, 1):
            return []
    return chosen if len(chosen) >= least else []


def draw_kwargs(rng, kind: str, seed: dict, keep_easy: float) -> dict | None:
    """Arguments that the model's plain answer violates where possible: what holds by itself teaches nothing."""
    for _ in range(8):
        kwargs = CONSTRAINTS[kind].sample(rng, seed["draft"], seed["language"], seed["text"])
        if kwargs is None or not rewards.check(kind, kwargs, seed["plain"]):
            return kwargs
    return kwargs if rng.random() < keep_easy else None


# ---------------------------------------------------------------- step 4: instruction wording


def variants(kind: str, language: str, heldout: bool, plain: bool) -> list[int]:
    """The last third of a kind's wordings (one at least) is for the held-out file only, the others for training.

    plain: only those that are a single sentence. One that quotes the request never is: its place is the end.
    """
    wordings = CONSTRAINTS[kind].wordings[language]
    split = len(wordings) - max(1, len(wordings) // 3)
    numbers = range(split, len(wordings)) if heldout else range(split)
    return [n for n in numbers if not plain or _PLAIN.fullmatch(re.sub(r"{\w+}", "", wordings[n]))]


_NOT_A_VERB = re.compile(
    r"(the|your|in|no|every|each|an?|there|it|this|all|at|i|if|both|only|within|as|nothing|please)\b", re.I
)
_PLAIN = re.compile(r"[^.!?。！？:：;；\n]*[.。]")  # one sentence that can stand in a branch: "if …, {sentence}"


@lru_cache(maxsize=1)
def phrases() -> dict:
    """data/joints.json: `joints` (what goes between sentences) and `conditions` (of Selection), per language."""
    return json.loads((data_dir / "joints.json").read_text("utf-8"))


def lower_first(sentence: str) -> str:
    """The sentence as it goes on after a comma: its first capital becomes small, but "I", "JSON" and "P.S." stay."""
    return sentence if re.match(r"I\b|[A-Z][A-Z.]|[^A-Za-z]", sentence) else sentence[0].lower() + sentence[1:]


def lead_in(rng, leads, sentence: str) -> str:
    polite = _NOT_A_VERB.match(sentence) is None
    lead = rng.choice([lead for lead in leads if lead != "Please " or polite])
    return lead + (lower_first(sentence) if lead.endswith((" ", "，")) else sentence)


def merge(rng, seed: dict, sentences: list[str]) -> str:
    """One instruction out of the request and the constraints' sentences, in their order, in one of several shapes."""
    request, joints = seed["text"], phrases()["joints"][seed["language"]]
    space = joints["space"]
    flow = [lead_in(rng, joints["first"] if i == 0 else joints["more"], s) for i, s in enumerate(sentences)]
    if request in sentences[-1]:  # "repeat this before you answer: …" holds the request itself
        return space.join(flow)
    # A request that ends in material to work on ("…: text", "…? text", lines): constraints must not run into it.
    quoted = re.search("[:：\n]|[?.!] ." if "understanding" in seed.get("topic", "") else "[:：\n]", request) or (
        not re.search("[.!?。！？][\"'”’)）」』]*$", request))
    shapes = ["bullets"] if quoted and len(sentences) > 1 else []
    shapes += ["before", "before"] if quoted else ["after", "after", "after", "before"]
    if len(sentences) > 1 and not any(re.search(r"[.!?。！？:：;；\n].", s.strip("\"'")) for s in sentences):
        shapes += ["list", "list"]
    shape = rng.choice(shapes)
    if shape == "bullets":
        return f"{request}\n\n{rng.choice(joints['after'])}\n" + "\n".join(f"- {s}" for s in sentences)
    if shape == "before":
        intro = "" if re.search("[:：]", sentences[0]) else rng.choice(joints["before"])
        rules = [lower_first(sentences[0]) if intro else sentences[0], *flow[1:]]
        return f"{intro}{space.join(rules)}\n\n{rng.choice(joints['request'])}{request}"
    if shape == "list":
        bare = [re.sub("[.。]$", "", s) for s in sentences]
        more, last = joints["list"]
        rules = more.join([bare[0], *map(lower_first, bare[1:-1])]) + last + lower_first(bare[-1])
        rules += sentences[-1][len(bare[-1]) :]
        return f"{rules}\n\n{rng.choice(joints['request'])}{request}" if quoted else f"{request}{space}{rules}"
    return f"{request}{space}{space.join(flow)}"


# ---------------------------------------------------------------- step 4b: Chain, Selection, Nested


def draw_condition(rng, seed: dict) -> dict:
    """A fact about the request that code can decide, true or false of it: {"if", "holds", "why"}."""
    request, size = seed["text"], count_words(seed["text"])
    form = rng.choice(phrases()["conditions"][seed["language"]])
    word = rng.choice([w for w in re.findall(r"[a-z]{4,}", request.lower()) if w not in _COMMON] or ["reply"])
    word = word if rng.random() < 0.5 else rng.choice(sorted(_COMMON))
    n = max(3, size + rng.choice((-4, -3, -2, 2, 3, 4)))
    holds = {
        "question": request.rstrip().endswith(("?", "？")),
        "longer": size > n,
        "comma": bool(re.search("[,，]", request)),
        "mentions": word in re.findall(r"[a-z]+", request.lower()),
    }[form["fact"]]
    why = form["holds" if holds else "fails"].format(n=n, size=size, word=word)
    return {"if": form["if"].format(n=n, word=word), "holds": holds, "why": why}


def compose(rng, language: str, composition: str, active: list[dict], other: dict, condition: dict | None):
    """(constraints in reading order with depends_on, their sentences) of a Chain, Selection or Nested instruction.

    `active` constraints hold for this request; `other` is the one of the branch not taken. Chain: each step depends on
    the one before. Selection: the last active one against `other`. Nested: a branch of two steps, or a branch as the
    second step.
    """
    joints = phrases()["joints"][language]
    texts = [lower_first(c["text"]) for c in active]
    if composition == "chain":
        for position in range(1, len(active)):
            active[position]["depends_on"] = [position - 1]
        leads = ["start", *["next"] * (len(active) - 2), "last"]
        sentences = [rng.choice(joints[lead]) + text for lead, text in zip(leads, texts, strict=True)]
        return active, [rng.choice(joints["steps"]), *sentences]
    taken, text, steps = active[-1:], texts[-1], composition == "nested"
    sentences = [c["text"] for c in active[: len(active) - 1 - steps]]
    if steps:
        active[-1]["depends_on"] = [len(sentences)]
        if rng.random() < 0.5:
            taken, text = active[-2:], joints["pair"].format(a=texts[-2], b=texts[-1])
        else:
            sentences.append(rng.choice(joints["start"]) + texts[-2])
            other["depends_on"] = [len(sentences) - 1]
    branches = [(taken, text), ([other], lower_first(other["text"]))]
    (first, then), (second, otherwise) = branches if condition["holds"] else branches[::-1]
    if first == [other] and len(taken) == 2:  # one place further on
        active[-1]["depends_on"] = [len(sentences) + 1]
    lead = rng.choice(joints["next"]) if len(sentences) and other["depends_on"] else ""
    rule = joints["if"].format(condition=condition["if"], then=then)
    sentences += [lead + (lower_first(rule) if lead else rule), joints["otherwise"] + otherwise]
    return active[: -len(taken)] + first + second, sentences


# ---------------------------------------------------------------- step 5: expert answer


def repair(rng, draft: str, constraints: list[tuple[str, dict]], rounds=4) -> tuple[str | None, str]:
    """(text that meets all constraints, "") or (None, kind it failed on). An edit may undo an earlier one: rounds."""
    ordered = sorted(constraints, key=lambda constraint: CONSTRAINTS[constraint[0]].order)
    text = draft
    for _ in range(rounds):
        for kind, kwargs in ordered:
            if not rewards.check(kind, kwargs, text):
                text = CONSTRAINTS[kind].repair(text, kwargs, rng)
                if text is None:
                    return None, kind
        failing = [kind for kind, kwargs in ordered if not rewards.check(kind, kwargs, text)]
        if not failing:
            return text, ""
    return None, failing[0]


def read_thoughts() -> dict[tuple[str, str], list[str]]:
    """(language, part) -> texts; parts: open, open_plain, joint, check_1 … check_3, form:<ability or topic>."""
    thoughts = defaultdict(list)
    for row in read_jsonl(data_dir / "thoughts.jsonl"):
        thoughts[row["language"], row["part"]].append(row["text"])
    return thoughts


def subject(request: str, draft: str) -> str:
    """What request and draft share: up to three content words in the order of the request; neighbours stay together."""
    stems = {word[:5] for word in re.findall(r"[a-z'-]{4,}", draft.lower())}
    words = re.findall(r"[A-Za-z'-]+|[^\w\s]", request)
    inner = [
        i for i in range(1, len(words)) if words[i - 1] not in (".", "!", "?", ":")
    ]  # a sentence opens with its verb
    content = [i for i in inner if len(words[i]) > 3 and words[i].lower() not in _COMMON and words[i] not in words[:i]]
    shared = [i for i in content if words[i].lower()[:5] in stems]
    longest = sorted(sorted(shared, key=lambda i: -len(words[i]))[:3])
    phrases: list[str] = []
    for position, i in enumerate(longest):
        if position and longest[position - 1] == i - 1:
            phrases[-1] += " " + words[i]
        else:
            phrases.append(words[i])
    return ", ".join(phrases[:-1]) + " and " + phrases[-1] if len(phrases) > 1 else "".join(phrases)


_COMMON = frozenset(
    "about advice after also always answer because been before best better brief briefly could describe does each "
    "easily easy enjoy everyone explain find first five from give good have help here into just keep keeps kind "
    "like line lines little long make many mean more most much name need never often only other people quick "
    "really remember reply request sentence sentences short shortly should simple small some someone something "
    "suggest take tell text than that their them then there these they this three today topic topics usually very "
    "want ways what when where which while will with without word words would write your".split()
)


def compose_thought(rng, seed: dict, constraints, thoughts, condition: dict | None) -> str:
    """A short thought: what is asked, which branch applies, how each constraint will be met, a last check."""
    language = seed["language"]
    by_name = (thoughts.get((language, f"form:{seed.get(field)}")) for field in ("ability", "topic"))
    forms = next(filter(None, by_name), thoughts[language, "form:"])
    about = subject(seed["text"], seed["draft"]) if language == "en" else ""
    opening = rng.choice(thoughts[language, "open" if about else "open_plain"])
    parts = [opening.format(form=rng.choice(forms), subject=about)]
    parts[0] = parts[0][0].upper() + parts[0][1:]
    if condition:
        branch = phrases()["joints"][language]["decide" if condition["holds"] else "decide_not"]
        parts.append(rng.choice(branch).format(why=condition["why"]))
    for position, (kind, kwargs) in enumerate(constraints):
        sentence = rewards.plan(kind, kwargs, language, rng.randrange(1000))
        joint = rng.choice(thoughts[language, "joint"]) if position and not sentence.startswith("First") else ""
        parts.append(joint + (lower_first(sentence) if joint else sentence))
    parts.append(rng.choice(thoughts[language, f"check_{len(constraints)}"]))
    return phrases()["joints"][language]["space"].join(parts)


# ---------------------------------------------------------------- steps 3 to 5 for one request


def draw_plan(rng, seed, tried: Counter, cfg: Config, *, heldout, kinds, first, composition="and") -> dict | None:
    """What a record will ask for: `drawn` (id, kwargs), for Selection and Nested also a condition and `other`."""
    if composition != "and":
        kinds, first = ([k for k in some if variants(k, seed["language"], heldout, True)] for some in (kinds, first))
    least = {"and": 1, "selection": 1, "chain": 2, "nested": 2}[composition]
    drawn = draw_constraints(rng, seed, kinds, first, tried, cfg, least)
    plan = {"drawn": drawn, "heldout": heldout, "composition": composition, "condition": None, "other": None}
    if drawn and composition in ("selection", "nested"):
        plan["condition"] = draw_condition(rng, seed)
        common = sorted(dict(drawn), key=lambda kind: CONSTRAINTS[kind].order)[:-1]  # holds in both branches
        unused = [kind for kind in kinds if kind not in dict(drawn) and rewards.compatible([kind, *common])]
        fitting = ((kind, draw_kwargs(rng, kind, seed, 1.0)) for kind in rng.sample(unused, len(unused)))
        plan["other"] = next(((kind, kwargs) for kind, kwargs in fitting if kwargs is not None), None)
        drawn = drawn if plan["other"] else []
    return plan if drawn else None


def assistant_turn(thought: str, answer: str) -> str:
    return f"<think>\n{thought}\n</think>\n<answer>\n{answer}\n</answer>"


def as_record(seed, composition: str, instruction: str, constraints, condition=None, expert: str | None = None) -> dict:
    record = {"id": seed["id"], "source": "evolve", "task": "instruction", "language": seed["language"],
              "messages": [{"role": "user", "content": instruction}], "constraints": constraints,
              "composition": composition}
    record |= {"condition": condition} if condition else {}  # what decides between the branches: if, holds, why
    record |= {"expert": expert} if expert else {}
    return record | {"seed": seed["id"], "topic": seed.get("topic", "")}


def make_record(rng, seed, plan: dict, thoughts, cfg: Config, counts: Counter, expert=True) -> dict | None:
    """The record of a plan, with the repaired draft as its checked expert answer, or None: the reason is counted."""
    language, drawn, composition = seed["language"], plan["drawn"], plan["composition"]
    if expert:
        answer, failed = repair(rng, seed["draft"], drawn)
        if answer is None:
            counts[f"not repaired: {failed}"] += 1
            return None
        if count_words(answer) > cfg.max_words * (1.6 if language == "zh" else 1):
            counts["answer too long"] += 1
            return None
    if composition == "and":  # in the instruction's order; a sentence that quotes the request comes last
        drawn = sorted(rng.sample(drawn, len(drawn)), key=lambda drawn: drawn[0] == "combination:repeat_prompt")
    else:  # in the order of work: words, lengths, structure, marks, edges
        drawn = sorted(drawn, key=lambda constraint: CONSTRAINTS[constraint[0]].order)
    asked = [*drawn, plan["other"]] if plan["other"] else drawn
    constraints = []
    for kind, kwargs in asked:
        variant = rng.choice(variants(kind, language, plan["heldout"], composition != "and"))
        text = rewards.render(kind, kwargs, language, variant)
        entry = {"kind": "code", "id": kind, "kwargs": kwargs, "text": text, "depends_on": [], "active": True}
        constraints.append(entry)
    thought = compose_thought(rng, seed, drawn, thoughts, plan["condition"]) if expert else ""
    if composition == "and":
        instruction = merge(rng, seed, [c["text"] for c in constraints])
    else:
        other = constraints.pop() | {"active": False} if plan["other"] else None
        constraints, sentences = compose(rng, language, composition, constraints, other, plan["condition"])
        joints = phrases()["joints"][language]
        instruction = f"{joints['space'].join(sentences)}\n\n{joints['label']}{seed['text']}"
    turn = assistant_turn(thought, answer) if expert else None
    record = as_record(seed, composition, instruction, constraints, plan["condition"], turn)
    # The last word has the scoring path of training itself, on the whole assistant turn.
    if expert and rewards.score([record], [record["expert"]])[0].total != 3.0:
        counts["expert does not score +3"] += 1
        return None
    counts["kept"] += 1
    counts["kept: the plain answer meets all"] += all(rewards.check(*constraint, seed["plain"]) for constraint in drawn)
    return record


def count_words(text: str) -> int:
    return len(re.findall(r"[\u4e00-\u9fff]|[^\s\u4e00-\u9fff]+", text))


def fill(split: str, seeds, rounds: int, target: int | None, kinds, first, cfg: Config, funnel) -> list[dict]:
    """Records of one file: every request in turn, other kinds each time, for `rounds` or until `target` is reached."""
    records, tried, taken, thoughts = [], Counter(), defaultdict(set), read_thoughts()
    turns = [(use, seed) for use in range(rounds) for seed in seeds]
    for use, seed in tqdm(turns, desc=split, unit="record"):
        for attempt in range(3):
            if len(records) == target:
                return records
            stream = f"{cfg.seed}/{split}/{use}/{attempt}/{seed['id']}"
            rng = random.Random(stream)
            wanted = first or [kind for kind in seed.get("fits", ()) if kind in kinds]
            composition = "and"
            if cfg.compositions == "all" and all(variants(k, seed["language"], split != "train", True) for k in wanted):
                composition = random.Random(f"{stream}/form").choice(COMPOSITIONS)
            fresh = [[kind for kind in some if kind not in taken[seed["id"]]] for some in (kinds, wanted)]
            plan = draw_plan(rng, seed, tried, cfg, heldout=split != "train", kinds=fresh[0], first=fresh[1],
                             composition=composition)
            if plan is None:
                funnel[split]["no constraint fits"] += 1
            elif record := make_record(rng, seed, plan, thoughts, cfg, funnel[split]):
                asked = {constraint["id"] for constraint in record["constraints"]}
                records.append(record | ({"ood": bool(asked & set(OOD_KINDS))} if split != "train" else {}))
                taken[seed["id"]] |= asked
                break
    return records


# ---------------------------------------------------------------- with a served model: calls, log, tokens

ATTEMPTS = 5  # unusable replies to one question before it counts as unanswered


def make_ask(cfg: Config, folder: Path, cache: Path, spent: dict):
    """ask(step, items, write, read): one value per item, the only way to a served model.

    write(item) is the prompt (a text or messages); read(item, reply) the value, or None for a reply that cannot be
    used, which is asked for again with another seed. The value stays None after `attempts`. Every reply is a line of
    calls.jsonl and adds to spent[step]. Finished replies are kept under `cache`: a killed run repeats none.
    """
    names = {"llm": (cfg.llm, cfg.llm_url), "expert": (cfg.expert, cfg.expert_url), "judge": (cfg.judge, cfg.judge_url)}
    settings = {"cache": cache, "concurrency": cfg.concurrency, "timeout": 600.0, "skip_refused": True}
    served = {role: Endpoint(url or cfg.llm_url, name or cfg.llm, **settings) for role, (name, url) in names.items()}
    write_atomic(folder / "calls.jsonl", "")

    def ask(step, items, write, read, *, role="llm", temperature=0.0, seed=0, attempts=ATTEMPTS) -> list:
        if not items:
            return []
        endpoint, values, pending = served[role], [None] * len(items), list(range(len(items)))
        endpoint.progress, before = step, dict(endpoint.tokens)
        for attempt in range(attempts):
            prompts = [write(items[i]) for i in pending]
            talks = [[{"role": "user", "content": text}] if isinstance(text, str) else text for text in prompts]
            heat = max(temperature, 0.7) if attempt else temperature
            replies = endpoint.chat(talks, max_tokens=cfg.max_tokens, temperature=heat,
                                    seed=cfg.seed + seed + 1000 * attempt)
            with open(folder / "calls.jsonl", "a", encoding="utf-8") as log:
                for i, talk, [reply] in zip(pending, talks, replies, strict=True):
                    values[i] = read(items[i], reply) if reply.finish_reason == "stop" else None
                    row = {"step": step, "attempt": attempt, "used": values[i] is not None, "messages": talk}
                    row |= {"reply": reply.text, "reasoning": reply.reasoning, "finish": reply.finish_reason}
                    log.write(json.dumps(row, ensure_ascii=False) + "\n")
            spent[step]["calls"] += len(pending)
            pending = [i for i in pending if values[i] is None]
            if not pending:
                break
        spent[step].update({name: count - before[name] for name, count in endpoint.tokens.items()})
        return values

    return ask


def read_json(reply, field: str):
    """A field of the JSON object in a reply, None where there is none (fences and a thought around it are fine)."""
    found = re.search(r"\{.*\}", reply.text.rpartition("</think>")[2], re.S)
    try:
        value = json.loads(found[0]) if found else None
    except (ValueError, RecursionError):
        return None
    return value.get(field) if isinstance(value, dict) else None


def read_word(reply, known: str) -> str | None:
    """The first of the words `known` ("true|false|na") in a reply, lower case."""
    found = re.search(rf"\b({known})\b", reply.text.rpartition("</think>")[2].lower())
    return found[1] if found else None


def keep(folder: Path, step: str, rows) -> None:
    """What a step made, as steps/NUMBER-step.jsonl."""
    write_jsonl(folder / "steps" / f"{len(list((folder / 'steps').glob('*')))}-{step}.jsonl", rows)


# ---------------------------------------------------------------- with a served model: constraints

WORDED = {  # the kinds whose words have to suit the request, and where they stand
    "keywords:existence": "keywords",
    "keywords:frequency": "keyword",
    "keywords:forbidden_words": "forbidden_words",
    "length_constraints:nth_paragraph_first_word": "first_word",
}
LANGUAGES = {"en": "English", "zh": "Chinese"}


def as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def suggest_words(plans: list[tuple[dict, dict]], ask) -> None:
    """Words of the model's choice for the WORDED kinds of (seed, plan) pairs; where none is usable the drawn stay.

    Usable: a single word in the request's language that no other constraint of the plan names. The request's own words
    are not forbidden: the answer could hardly avoid them.
    """
    items = [(seed, plan, i) for seed, plan in plans for i, (kind, _) in enumerate(plan["drawn"]) if kind in WORDED]

    def drawn_words(plan, i):
        kind, kwargs = plan["drawn"][i]
        return as_list(kwargs[WORDED[kind]])

    def taken(item):
        seed, plan, i = item
        others = [c for c in [*plan["drawn"], plan["other"]] if c and c != plan["drawn"][i]]
        named = {str(word).casefold() for _, kwargs in others for value in kwargs.values() for word in as_list(value)}
        return named | (set(tokens(seed["text"])) if "forbidden" in plan["drawn"][i][0] else set())

    def write(item):
        seed, plan, i = item
        rule = rewards.render(*plan["drawn"][i], seed["language"], 0)
        return prompt_text("evolve_words", request=seed["text"], rule=rule, language=LANGUAGES[seed["language"]],
                           count=len(drawn_words(plan, i)) + 2, taken=", ".join(sorted(taken(item))) or "(none)")

    def read(item, reply):
        seed, plan, i = item
        form = re.compile(r"[A-Za-z][A-Za-z'-]{1,24}" if seed["language"] == "en" else "[\u4e00-\u9fff]{1,6}")
        offered = [w for w in as_list(read_json(reply, "words")) if isinstance(w, str) and form.fullmatch(w)]
        words = list(dict.fromkeys(word for word in offered if word.casefold() not in taken(item)))
        count = len(drawn_words(plan, i))
        return words[:count] if len(words) >= count else None

    for item, words in zip(items, ask("words", items, write, read, temperature=0.7), strict=True):
        _, plan, i = item
        if words and not {word.casefold() for word in words} & taken(item):  # an earlier suggestion may have taken one
            kind, kwargs = plan["drawn"][i]
            several = isinstance(kwargs[WORDED[kind]], list)
            plan["drawn"][i] = (kind, kwargs | {WORDED[kind]: words if several else words[0]})


def conditions_of(item: dict) -> list:
    """The condition of a Selection and the one inside it, as far as there are any."""
    outer = item.get("condition")
    return [c for c in (outer, outer.get("inner") if isinstance(outer, dict) else None) if c]


def has_texts(rows, count: int, *names: str) -> bool:
    """A list of `count` objects whose fields `names` are texts?"""
    return isinstance(rows, list) and len(rows) == count and all(
        isinstance(row, dict) and all(filled(row.get(name)) for name in names) for row in rows)


def judged_records(items: list[dict], ask, counts: Counter) -> list[dict]:
    """Records with judge constraints for items {"seed", "composition", "example"}.

    The parts of an exemplar are rewritten for the request, the condition is checked, then request and parts are merged
    into one instruction; a second look confirms that nothing was added or lost, or the merge is repeated, twice.
    """

    def fill_in(name, item, **slots):
        example, language = json.dumps(item["example"], ensure_ascii=False, indent=1), item["seed"]["language"]
        return prompt_text(name, request=item["seed"]["text"], example=example, language=LANGUAGES[language], **slots)

    def write_parts(item):
        truths = [str(condition["holds"]).lower() for condition in conditions_of(item["example"])]
        rule = (f"- In place of the example's condition write one on the new request, plainly "
                f"{' and the inner one '.join(truths)} of it for everyone who reads the request alone, and why.\n")
        form = ', "condition": {"if": "…", "why": "…"' + (', "inner": {"if": "…", "why": "…"}}' if truths[1:] else "}")
        return fill_in("evolve_rewrite", item, count=len(item["example"]["parts"]),
                       condition_rule=rule if truths else "", condition_form=form if truths else "")

    def read_parts(item, reply):
        example, parts = item["example"], read_json(reply, "parts")
        meant = conditions_of(example)
        found = conditions_of({"condition": read_json(reply, "condition")})[: len(meant)]
        if not has_texts(parts, len(example["parts"]), "text", "question"):
            return None
        if not has_texts(found, len(meant), "if", "why"):
            return None
        kept = [{name: part[name] for name in ("dimension", "depends_on", "active")} for part in example["parts"]]
        new = [{"kind": "judge", "question": part["question"], "text": part["text"]} for part in parts]
        made = {"constraints": [own | model for own, model in zip(new, kept, strict=True)]}
        pairs = zip(found, meant, strict=True)
        conditions = [{"if": own["if"], "holds": model["holds"], "why": own["why"]} for own, model in pairs]
        inner = {"inner": conditions[1]} if conditions[1:] else {}
        return made | ({"condition": conditions[0] | inner} if conditions else {})

    rewritten = ask("rewrite", items, write_parts, read_parts, temperature=0.7)
    counts["parts not rewritten"] += rewritten.count(None)
    items = [item | parts for item, parts in zip(items, rewritten, strict=True) if parts]

    asked = [(item, condition) for item in items for condition in conditions_of(item)]
    found = ask("condition", asked, lambda pair: fill_in("evolve_condition", pair[0], condition=pair[1]["if"]),
                lambda pair, reply: read_word(reply, "true|false|unclear"))
    wrong = {item["seed"]["id"] for (item, condition), truth in zip(asked, found, strict=True)
             if truth != str(condition["holds"]).lower()}
    counts["condition not as meant"] += len(wrong)
    pending, merged = [item for item in items if item["seed"]["id"] not in wrong], {}

    def listed(item):
        shown = ("text", "depends_on", "active")
        rows = [{"number": i} | {name: c[name] for name in shown} for i, c in enumerate(item["constraints"])]
        rows += [{"condition": condition["if"]} for condition in conditions_of(item)]
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)

    def read_instruction(item, reply):
        text = read_json(reply, "instruction")
        return text.strip() if filled(text) else None

    for turn in range(3):
        texts = ask("merge", pending, lambda item: fill_in("evolve_merge", item, parts=listed(item)), read_instruction,
                    temperature=0.7, seed=turn)
        pairs = [(item, text) for item, text in zip(pending, texts, strict=True) if text]
        same = ask("compare", pairs, lambda pair: fill_in(
            "evolve_compare", pair[0], parts=listed(pair[0]), instruction=pair[1]),
                   lambda _, reply: rewards.read_verdict(reply))
        merged |= {item["seed"]["id"]: text for (item, text), yes in zip(pairs, same, strict=True) if yes}
        pending = [item for item in pending if item["seed"]["id"] not in merged]
    counts["parts lost or added in merging"] += len(pending)
    counts["kept"] += len(merged)
    return [as_record(item["seed"], item["composition"], merged[item["seed"]["id"]], item["constraints"],
                      item.get("condition")) for item in items if item["seed"]["id"] in merged]


# ---------------------------------------------------------------- with a served model: expert answers


def read_expert(record: dict, reply) -> tuple[str, str] | None:
    """(thought, answer) of a reply: the thought from the server's reasoning field or from think tags."""
    if reply.reasoning:
        parsed = rewards.parse_response(f"<think></think>{reply.text}")
        think = reply.reasoning.strip()
    else:
        parsed = rewards.parse_response(reply.text, "cold" if "<answer>" in reply.text else "warm")
        think = parsed.think if parsed.format_ok else ""
    tagged = any(tag in think + parsed.answer for tag in rewards.TAGS["cold"])
    return (think, parsed.answer) if parsed.answer and not tagged and not rewards.is_placeholder(think) else None


def holds_code(record: dict, answer: str) -> bool:
    active = [c for c in record["constraints"] if c["kind"] == "code" and c["active"]]
    return all(rewards.check(c["id"], c["kwargs"], answer, prompt=record["messages"][0]["content"]) for c in active)


def add_experts(records: list[dict], ask, cfg: Config, counts: Counter) -> list[dict]:
    """The records with their shortest expert answer that meets all constraints, by code and by judge."""

    def write(record):
        trigger = (data_dir / "prompts" / f"cot.{record['language']}.txt").read_text("utf-8").strip()
        return [{"role": "system", "content": trigger}, *record["messages"]]

    def judge(items):
        verdicts = ask("judge", items, lambda item: rewards.judge_prompt(*item),
                       lambda _, reply: rewards.read_verdict(reply), role="judge")
        return [verdict is True for verdict in verdicts]

    passing: dict[str, list[str]] = {record["id"]: [] for record in records}
    for turn in range(cfg.tries):
        replies = ask("expert", records, write, read_expert, role="expert", temperature=cfg.expert_temperature,
                      seed=turn, attempts=2)  # long replies: those that run over the limit would again
        for record, reply in zip(records, replies, strict=True):
            if reply and holds_code(record, reply[1]):
                passing[record["id"]].append(assistant_turn(*reply))
    for answers in passing.values():
        answers.sort(key=count_words)
    kept: dict[str, str] = {}
    for rank in range(cfg.tries):  # the judge sees the shortest first, a longer one only if that fails
        pending = [r for r in records if r["id"] not in kept and len(passing[r["id"]]) > rank]
        answers = [passing[record["id"]][rank] for record in pending]
        scores = rewards.score(pending, answers, judge=judge)
        kept |= {r["id"]: a for r, a, s in zip(pending, answers, scores, strict=True) if s.total == 3.0}
    counts["kept"] += len(kept)
    counts["no answer passed the code checks"] += sum(not answers for answers in passing.values())
    counts["no answer passed the judge"] += sum(bool(a) and i not in kept for i, a in passing.items())
    return [record | {"expert": kept[record["id"]]} for record in records if record["id"] in kept]


# ---------------------------------------------------------------- with a served model: seven filters

FILTERS = ("language", "leakage", "length", "hallucination", "undefined", "contradiction", "unsafe")
OF_THE_INSTRUCTION = ("undefined", "contradiction", "unsafe")  # these need no answer
_SLOT = re.compile(r"\{\{\w+\}\}|\{(name|topic|text|input|keywords?)\}|[\[<]insert |lorem ipsum", re.I)


def quick_check(name: str, record: dict, answer: str) -> bool | None:
    """Is the fault of a filter there? True or False where code can tell, None where the model has to be asked."""
    instruction, words = record["messages"][0]["content"], tokens(answer)
    active = [c for c in record["constraints"] if c["kind"] == "code" and c["active"]]
    ids = {c["id"] for c in active}
    if name == "language" and not any(i.startswith(("language", "change_case")) for i in ids):  # those ask for another
        share = sum("\u4e00" <= word <= "\u9fff" for word in words) / max(1, len(words))
        if record["language"] == "zh":
            return True if share < 0.2 else False if share > 0.9 else None
        wanted = re.search("chinese|mandarin|translat|[\u4e00-\u9fff]", instruction, re.I)
        if share > 0.5 and not wanted:
            return True
        return False if share == 0 and rewards.detect_language(answer) == "en" else None
    found = {"length": not words or len(answer) > rewards.MAX_CHARS // 2}
    if name == "leakage":
        copied = len(words) > 5 and " ".join(words) in " ".join(tokens(instruction))
        found[name] = (copied and "combination:repeat_prompt" not in ids) or any(
            c["kind"] == "judge" and c["question"] in answer for c in record["constraints"])
    if name == "undefined":
        found[name] = _SLOT.search(instruction) or count_words(instruction) < 3
    if name == "contradiction":
        fields = ("keywords", "keyword", "first", "second", "word", "first_word")
        wanted = {str(word).lower() for c in active for field in fields for word in as_list(c["kwargs"].get(field))
                  if c["id"] != "keywords:any_of" and c["kwargs"].get("relation") not in ("less than", "at most")}
        banned = {word.lower() for c in active for word in c["kwargs"].get("forbidden_words") or []}
        found[name] = wanted & banned or not rewards.compatible(ids) or len(ids) < len(active)
    if name == "unsafe":
        terms = filter(None, (data_dir / "unsafe.txt").read_text("utf-8").split("\n"))
        found[name] = any(re.search(rf"(?<![a-z]){re.escape(t)}", f"{instruction}\n{answer}".lower()) for t in terms)
    return True if found.get(name) else None


def apply_filters(records: list[dict], ask, folder: Path, funnel) -> list[dict]:
    """The records in which no filter finds its fault; each sees what the ones before it have left."""
    answers = {r["id"]: rewards.parse_response(r.get("expert", "")).answer for r in records}
    for name in FILTERS:

        def write(record, name=name):
            instruction, answer = record["messages"][0]["content"], answers[record["id"]] or "(none yet)"
            return prompt_text("filter", instruction=instruction, answer=answer, rubric=prompt_text(f"filter_{name}"))

        judged = [r for r in records if answers[r["id"]] or name in OF_THE_INSTRUCTION]
        verdicts = dict.fromkeys((r["id"] for r in records), "na")
        verdicts |= {r["id"]: quick_check(name, r, answers[r["id"]]) for r in judged}
        unclear = [r for r in records if verdicts[r["id"]] is None]
        replies = ask(f"filter {name}", unclear, write, lambda record, reply: read_word(reply, "true|false|na"))
        verdicts |= {r["id"]: reply for r, reply in zip(unclear, replies, strict=True)}
        keep(folder, f"filter-{name}", [{"id": r["seed"], "verdict": verdicts[r["id"]]} for r in records])
        reasons = {True: "found by code", "true": "found by the model", None: "no verdict"}
        funnel[f"filter: {name}"].update(reasons.get(verdicts[r["id"]], "kept") for r in records)
        records = [r for r in records if verdicts[r["id"]] not in reasons]
    return records


def evolve_served(seeds: list[dict], trained, ask, cfg: Config, folder: Path, funnel) -> list[dict]:
    """One record per request with constraints, answers and filters of served models."""
    tried, thoughts, by_form = Counter(), read_thoughts(), defaultdict(list)
    for exemplar in read_jsonl(data_dir / "exemplars.jsonl"):
        by_form[exemplar["language"], exemplar["composition"]].append(exemplar)
    plans, soft, counts = [], [], funnel["constraints"]
    for seed in seeds:
        rng, heldout = random.Random(f"{cfg.seed}/served/{seed['id']}"), is_heldout(seed["id"], cfg)
        composition = "and" if cfg.compositions == "and" else rng.choice(COMPOSITIONS)
        if rng.random() < cfg.judge_share:
            example = rng.choice(by_form[seed["language"], composition])
            soft.append({"seed": seed, "composition": composition, "example": example})
            continue
        kinds = [*trained, *(OOD_KINDS if heldout else ())]
        plan = draw_plan(rng, seed, tried, cfg, heldout=heldout, kinds=kinds, first=(), composition=composition)
        counts["no constraint fits"] += plan is None
        plans += [(seed, plan)] if plan else []
    suggest_words(plans, ask)
    repaired = cfg.expert == "repair"
    made = [make_record(random.Random(f"{cfg.seed}/worded/{seed['id']}"), seed, plan, thoughts, cfg, counts, repaired)
            for seed, plan in plans]
    records = [record for record in made if record] + judged_records(soft, ask, counts)
    keep(folder, "constraints", [{k: v for k, v in r.items() if k != "expert"} for r in records])
    if repaired:  # code cannot edit a text towards a judge's yes: those stay without an answer
        funnel["expert"].update("kept" for _ in records)
        funnel["expert"]["kept without an answer"] += sum("expert" not in r for r in records)
    else:
        records = add_experts(records, ask, cfg, funnel["expert"])
    keep(folder, "expert", [{"id": r["id"], "expert": r.get("expert")} for r in records])
    return apply_filters(records, ask, folder, funnel)


# ---------------------------------------------------------------- step 6: files and report


def math_records(source: str) -> list[dict]:
    """Math records: the file's own, or made of DeepScaleR (problem, answer), GSM8K (#### result) or MATH rows."""
    records = []
    for where, row in rows_of(source):
        if "task" in row:
            return rewards.read_records(source)
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


def mix_in_math(records: list[dict], cfg: Config, rng) -> list[dict]:
    if not cfg.math_ratio:
        return records
    math = math_records(cfg.math or str(data_dir / "arithmetic.jsonl"))
    wanted = round(cfg.math_ratio * len(records))
    if wanted > len(math):
        print(f"--math-ratio {cfg.math_ratio} asks for {wanted} math records, there are {len(math)}: all taken",
              file=sys.stderr)
    return records + rng.sample(math, min(wanted, len(math)))


_USER_TURNS = (  # of the chat templates of Qwen and SmolLM, DeepSeek, LLaMA 3, Mistral
    r"<\|im_start\|>user\n(.*?)<\|im_end\|>",
    r"<｜User｜>(.*?)<｜Assistant｜>",
    r"<\|start_header_id\|>user<\|end_header_id\|>\s*(.*?)<\|eot_id\|>",
    r"\[INST\](.*?)\[/INST\]",
)


def user_text(rendered: str) -> str:
    """The last user turn of a prompt that a chat template has rendered."""
    found = [turn for pattern in _USER_TURNS for turn in re.findall(pattern, rendered, re.S)]
    return (found[-1] if found else rendered).strip()


def raif_records(sources: str, counts: Counter) -> list[dict]:
    """Records of the released RAIF files: RL rows {input, task, target}, SFT rows {question, answer}.

    A task "ifeval…" has code constraints, "complex…" judge questions, any other is math. An SFT answer becomes the
    expert of the RL row with the same request; left alone it gets one question about the whole instruction.
    """
    rows, experts, records = [], {}, []
    for where, row in (pair for source in sources.split(",") for pair in rows_of(source)):
        if {"input", "task", "target"} <= row.keys():
            rows.append((where, row["task"], user_text(row["input"]), row["target"]))
        elif filled(row.get("question")) and filled(row.get("answer")):
            opened = re.search(r"<think>\s*$", row["question"]) and "<think>" not in row["answer"]
            answer = "<think>" * bool(opened) + row["answer"]
            parsed = rewards.parse_response(answer, "cold" if "<answer>" in answer else "warm")
            turn = assistant_turn(parsed.think, parsed.answer) if parsed.format_ok else answer
            experts[user_text(row["question"])] = (where, turn)
        else:
            raise InputError(f"{where}: neither an RL row (input, task, target) nor an SFT row (question, answer)")
    known = {text for _, _, text, _ in rows}
    whole = {"en": "Does the reply do all that is asked?", "zh": "回答是否满足了指令的全部要求？"}
    rows += [(where, "sft", text, None) for text, (where, _) in experts.items() if text not in known]
    for where, task, text, target in rows:
        language = language_of(text) or "en"
        record = {"id": f"raif-{len(records) + 1:06d}", "source": "raif", "task": "instruction", "language": language,
                  "messages": [{"role": "user", "content": text}]}
        record |= {"expert": experts[text][1]} if text in experts else {}
        try:
            if task == "sft":
                target = {"scoring_questions": [whole[language]]}
            elif not task.startswith(("ifeval", "complex")):
                record |= {"task": "math", "answer": str(target)}
            elif isinstance(target, str):
                target = json.loads(target)
            if task.startswith("ifeval"):
                pairs = zip(target["instruction_id_list"], target["kwargs"], strict=True)
                record["constraints"] = [
                    {"kind": "code", "id": kind, "text": kind,
                     "kwargs": {name: value for name, value in (kwargs or {}).items() if value is not None}}
                    for kind, kwargs in pairs]
            elif record["task"] == "instruction":
                asked = target["scoring_questions"]
                record["constraints"] = [{"kind": "judge", "question": text, "text": text} for text in asked]
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


def write_records(path: Path, records: list[dict], prefix: str) -> list[dict]:
    for number, record in enumerate((r for r in records if r["task"] == "instruction"), 1):
        record["id"] = f"{prefix}-{number:06d}"
    write_jsonl(path, records)
    return rewards.read_records(path)  # what the next stages will read, through their own validation


def dimension_of(constraint: dict) -> str:
    """One of CFBench's dimensions: a judge constraint has its exemplar's, a code one that of its kind."""
    group, _, name = constraint.get("id", "").partition(":")
    if "dimension" in constraint or not group:
        return constraint.get("dimension", "other")
    if name.startswith(("forbidden", "no_")):
        return "inverse"
    if name.startswith(("number_", "nth_")) and "format" not in group or group == "length" or "frequency" in name:
        return "numerical"
    return {"keywords": "content", "content": "content", "detectable_content": "content", "combination": "rule",
            "change_case": "linguistic", "language": "linguistic", "punctuation": "linguistic"}.get(group, "format")


def table(*rows) -> list[str]:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:], ""]


def parts_of(record: dict) -> dict[str, str]:
    parsed = rewards.parse_response(record.get("expert", ""))
    return {"instruction": record["messages"][0]["content"], "thought": parsed.think, "answer": parsed.answer}


def report(funnel, files: dict[str, list[dict]], spent, cfg: Config) -> str:
    files = {split: [r for r in records if r["task"] == "instruction"] for split, records in files.items()}
    lines = ["# Instruction evolution", "", "## Funnel", ""]
    rows = [("step", "in", "kept", "dropped")]
    for step, counts in funnel.items():
        dropped = {reason: n for reason, n in sorted(counts.items()) if not reason.startswith("kept") and n}
        reasons = ", ".join(f"{reason} {n}" for reason, n in dropped.items())
        rows.append((step, counts["kept"] + sum(dropped.values()), counts["kept"], reasons or "-"))
    lines += table(*rows)
    lines += ["Offline, a request is tried up to three times per record; each failed try is counted.", ""]
    lines += ["## Files", ""]
    words = [f"words: {name}" for name in ("instruction", "thought", "answer")]
    rows = [("file", "records", "1, 2, 3 … constraints", "plain answer meets all", *words)]
    for split, records in files.items():
        if records:
            sizes = Counter(sum(c["active"] for c in r["constraints"]) for r in records)
            easy = "–" if cfg.llm else f"{funnel[split]['kept: the plain answer meets all'] / len(records):.0%}"
            words = [mean(count_words(parts_of(r)[name]) for r in records) for name in parts_of(records[0])]
            counts = ", ".join(str(sizes[n]) for n in range(1, max(sizes) + 1))
            rows.append((split, len(records), counts, easy, *(f"{n:.0f}" for n in words)))
    lines += table(*rows) + ["![lengths](lengths.png)", ""]
    if spent:
        numbers = ("calls", "prompt_tokens", "completion_tokens")
        cost = {step: (c["prompt_tokens"] * cfg.price_in + c["completion_tokens"] * cfg.price_out) / 1e6
                for step, c in spent.items()}
        lines += ["## Tokens", ""] + table(
            ("step", "calls", "prompt tokens", "tokens written", "cost"),
            *((step, *(c[name] for name in numbers), f"{cost[step]:.2f}") for step, c in spent.items()),
            ("all", *(sum(c[name] for c in spent.values()) for name in numbers), f"{sum(cost.values()):.2f}"))
    coverage = {
        "kind": lambda r: [c.get("id", "judge") for c in r["constraints"]],
        "dimension": lambda r: [dimension_of(c) for c in r["constraints"]],
        "composition": lambda r: [r["composition"]],
        "language": lambda r: [r["language"]],
        "topic": lambda r: [r["topic"] or "other"],
    }
    for name, found in coverage.items():
        counts = {split: Counter(x for r in records for x in set(found(r))) for split, records in files.items()}
        order = [x for x in [*CONSTRAINTS, *sorted(set().union(*counts.values()) - set(CONSTRAINTS))]
                 if any(count[x] for count in counts.values())]
        lines += [f"## Records per {name}", ""]
        lines += table((name, *files), *((x, *(counts[split][x] for split in files)) for x in order))
    return "\n".join(lines)


def plot_lengths(path: Path, records: list[dict]) -> None:
    """Histograms of the words in instructions, thoughts and answers."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(12, 3), layout="constrained")
    for axis, name in zip(axes, ("instruction", "thought", "answer"), strict=True):
        for language in sorted({record["language"] for record in records}):
            sizes = [count_words(parts_of(r)[name]) for r in records if r["language"] == language]
            axis.hist(sizes, bins=30, alpha=0.6, label=language)
        axis.set_xlabel(f"words: {name}")
    axes[0].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def show_steps(folder: Path, seeds: list[dict]) -> None:
    """What each step made of each request, for reading."""
    for seed in seeds:
        print(f"\n{'=' * 100}\n{seed['id']}")
        for path in sorted((folder / "steps").iterdir(), key=lambda path: int(path.name.partition("-")[0])):
            for row in read_jsonl(path):
                if seed["id"] in (row["id"], row.get("seed")):
                    print(f"\n[{path.stem}]")
                    for name, value in row.items():
                        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                        print(f"  {name}: " + text.replace("\n", "\n    "))


def main(argv=None):
    cfg = parse_flags(Config, argv)
    if bool(cfg.llm) != bool(cfg.llm_url):
        raise InputError("--llm and --llm-url go together: the model's name and the address of its server")
    if not cfg.llm and (cfg.expert not in ("", "repair") or cfg.judge):
        raise InputError("--expert and --judge name served models; give --llm and --llm-url too")
    rank, _ = init_distributed()
    root = Path(cfg.out)
    if cfg.raif:
        counts = Counter()
        write_jsonl(open_run(root, cfg, resume=True) / "train.jsonl", raif_records(cfg.raif, counts))
        print("\n".join(table(("rows", "number"), *sorted(counts.items()))))
        return
    if cfg.dry_run:
        cfg = replace(cfg, limit=cfg.dry_run, out=str(root / "dry-run"))
    evolve(cfg, root, rank)
    everything = replace(cfg, kinds="all", compositions="all", language="both")
    if cfg.complete and cfg != everything and not (cfg.llm or cfg.seeds or cfg.limit or cfg.dry_run):
        evolve(replace(everything, out=str(root / "complete")), root, rank)


def evolve(cfg: Config, root: Path, rank: int) -> None:
    """All steps into one folder; drafts and finished calls are kept in (and taken from) `root`."""
    folder = open_run(cfg.out, cfg, resume=True)
    if rank and cfg.llm:
        return  # requests to a server are not split
    funnel, spent, hits = defaultdict(Counter), defaultdict(Counter), []
    if rank == 0:
        for stale in (folder / "steps").glob("*.jsonl"):
            stale.unlink()
    ask = make_ask(cfg, folder, root / "calls", spent) if cfg.llm else None

    known = read_benchmarks(cfg)
    seeds = drop_duplicates(read_seeds(cfg, funnel["requests"]), funnel)
    seeds = drop_contaminated(seeds, known, cfg, hits)
    if hits:
        funnel["requests"]["in a benchmark"] = len(hits)
    seeds.sort(key=lambda s: hashlib.sha256(f"{cfg.seed}/order/{s['id']}".encode()).digest())
    seeds = choose(seeds, ask, cfg, funnel["requests"])

    if ask:
        bare = [seed for seed in seeds if not seed.get("draft")]
        texts = ask("draft", bare, lambda seed: seed["text"],
                    lambda seed, reply: reply.text.rpartition("</think>")[2].strip() or None)
        plain = {seed["id"]: seed.get("draft") for seed in seeds}
        plain |= {seed["id"]: text for seed, text in zip(bare, texts, strict=True)}
    else:
        plain = write_drafts(seeds, cfg, root)
    if rank:
        return  # the rest takes seconds
    keep(folder, "requests", seeds)
    usable = []
    for seed in seeds:
        draft, reason = plain[seed["id"]], "no answer"
        if draft and not seed.get("draft") and (not ask or cfg.expert == "repair"):  # repairs need short, plain drafts
            draft, reason = cut_draft(draft, seed["language"], cfg.draft_words)
        funnel["drafts"]["kept" if draft else reason] += 1
        if draft:
            usable.append(seed | {"draft": draft, "plain": plain[seed["id"]]})
    keep(folder, "drafts", [{name: seed[name] for name in ("id", "plain", "draft")} for seed in usable])

    known_kinds = {"laptop": LAPTOP_KINDS, "ifeval": rewards.COMPAT, "all": CONSTRAINTS}[cfg.kinds]
    left_out = OOD_KINDS if cfg.kinds == "all" else OOD_KINDS + IDLE_KINDS
    trained = [kind for kind in CONSTRAINTS if kind in known_kinds and kind not in left_out]
    train_seeds = [seed for seed in usable if not is_heldout(seed["id"], cfg)]
    heldout_seeds = [seed for seed in usable if is_heldout(seed["id"], cfg)]
    if ask:
        train, heldout, ood = [], [], []
        for record in evolve_served(usable, trained, ask, cfg, folder, funnel):
            new = any(c.get("id") in OOD_KINDS for c in record["constraints"])
            split = (ood if new else heldout) if is_heldout(record["seed"], cfg) else train
            split.append(record if split is train else record | {"ood": new})
    else:
        train = fill("train", train_seeds, cfg.uses, None, trained, (), cfg, funnel)
        heldout = fill("held-out", heldout_seeds, 3, cfg.heldout, trained, (), cfg, funnel)
        ood = fill("ood", heldout_seeds, 2, cfg.ood, trained, OOD_KINDS, cfg, funnel)
        keep(folder, "records", train + heldout + ood)
    if cfg.dry_run:
        return show_steps(folder, seeds)
    if not train or not heldout + ood:
        raise InputError(
            f"{cfg.seeds or 'the shipped requests'}: {len(usable)} usable drafts from {len(seeds)} requests are "
            "too few for a training and a held-out file; raise --limit or take a model that writes sentences"
        )

    rng, listed = random.Random(cfg.seed), len(hits)
    train = rng.sample(train := mix_in_math(train, cfg, rng), len(train))
    mixed = rng.sample(heldout + ood, len(heldout + ood))
    train, mixed = (drop_contaminated(rows, known, cfg, hits) for rows in (train, mixed))
    if known:
        funnel["contamination"].update({"kept": len(train + mixed), "in a benchmark": len(hits) - listed})
        write_jsonl(folder / "contaminated.jsonl", hits)
    write_records(folder / "train.jsonl", train, "ev")
    write_records(folder / "heldout.jsonl", mixed, "held")
    write_jsonl(folder / "metrics.jsonl", [{"step": i, "name": name, **funnel[name]} for i, name in enumerate(funnel)])
    heldout, ood = ([record for record in mixed if record["ood"] is new] for new in (False, True))
    text = report(funnel, {"train": train, "held-out": heldout, "ood": ood}, spent, cfg)
    write_atomic(folder / "report.md", text)
    plot_lengths(folder / "lengths.png", [r for r in train + mixed if r["task"] == "instruction"])
    print(text)


if __name__ == "__main__":
    launch(main)
