"""Stage 1: plain requests become checked instructions with constraints, each with an expert answer that meets them all.

    python evolve.py                        520 shipped English requests -> runs/evolve/{train,heldout}.jsonl, report.md
    python evolve.py --language both        Chinese requests as well
    python evolve.py --limit 40 --out /tmp/e   a quick look

One step after the other: seeds -> drafts -> 1 to 3 compatible constraints with arguments that fit the draft -> one
natural instruction -> expert answer -> checks -> train and held-out files. The offline expert is *draft and repair*:
the local model answers the plain request, each constraint's `repair` edits that draft until every checker passes, and a
thought that works through the constraints is put in front. What fails is dropped and counted, never kept.
Held-out records have other requests and other wordings than training; some have kinds never trained on (OOD).
"""

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Literal

from tqdm import tqdm

import rewards
from model import (
    compute_dtype,
    data_dir,
    gather_objects,
    init_distributed,
    launch,
    load_model,
    make_engine,
    open_run,
    parse_flags,
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
    seeds: str = ""  # file of plain requests (default: the shipped ones of --language)
    kinds: Literal["laptop", "ifeval", "all"] = "laptop"  # kinds trained on: eight of the 25 of IFEval, those, or all
    language: Literal["en", "zh", "both"] = "en"  # language of the requests
    math: str = ""  # file of math records with experts (default: the shipped arithmetic)
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
    uses: int = 1  # training records per request
    heldout: int = 200  # held-out records of the trained kinds
    ood: int = 100  # held-out records with at least one kind never trained on
    max_words: int = 80  # longest expert answer, in words (1.6 characters a word in Chinese)
    limit: int = 0  # use only so many requests; 0 = all
    seed: int = 0  # everything random follows from it
    out: str = "runs/evolve"  # folder of the results; drafts found there are used again


# ---------------------------------------------------------------- step 1: seeds


def read_seeds(cfg: Config) -> list[dict]:
    """The plain requests, checked line by line: id, language, topic, ability, text; Chinese ones with a draft."""
    files = {"en": [data_dir / "seeds.jsonl"], "zh": [data_dir / "seeds_zh.jsonl"]}
    files["both"] = files["en"] + files["zh"]
    forms = [data_dir / "seeds_forms.jsonl"] if cfg.kinds == "all" else []  # drafts with lists, digits, questions …
    seeds, first_seen = [], {}
    for path in [Path(cfg.seeds)] if cfg.seeds else files[cfg.language] + forms:
        for number, seed in rewards.json_lines(path):
            where = f"{path}:{number}"
            if not isinstance(seed, dict):
                raise InputError(f"{where}: not a JSON object; one object per line is expected")
            if seed.get("language") not in ("en", "zh"):
                raise InputError(f"{where}: field 'language': {seed.get('language')!r} is unknown; use en or zh")
            for field in ["id", "text"] + (["draft"] if seed["language"] == "zh" else []):
                if not isinstance(seed.get(field), str) or not seed[field].strip():
                    raise InputError(f"{where}: field '{field}': missing or empty; give it a text")
            if seed["id"] in first_seen:
                raise InputError(
                    f"{where}: field 'id': {seed['id']!r} is that of {first_seen[seed['id']]}; make it unique"
                )
            first_seen[seed["id"]] = where
            if cfg.language in (seed["language"], "both"):
                seeds.append(seed)
    if not seeds:
        raise InputError(f"{cfg.seeds}: no request in language {cfg.language!r}; change --language")
    return seeds


def shingles(text: str) -> set:
    """Sets of three neighbouring words (three characters in Chinese), the unit of near-duplicate search."""
    words = re.findall(r"[a-z0-9']+|[\u4e00-\u9fff]", text.lower())
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def drop_duplicates(seeds: list[dict], funnel, threshold=0.5) -> list[dict]:
    """Keep the first of each group whose shingles overlap (Jaccard) by `threshold` or more."""
    kept = []
    for seed in seeds:
        own = shingles(seed["text"])
        overlap = max((len(own & other) / len(own | other) for _, other in kept), default=0.0)
        if overlap < threshold:
            kept.append((seed, own))
        else:
            funnel["requests"]["exact duplicate" if overlap == 1 else "near duplicate"] += 1
    funnel["requests"]["kept"] = len(kept)
    return [seed for seed, _ in kept]


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
                    [s["text"] for s in chunk]]
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
    # A request that ends in material to work on ("…: text", "…? text"): constraints must not run into it.
    quoted = re.search("[:：]|[?.!] ." if "understanding" in seed.get("topic", "") else "[:：]", request)
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
        unused = [kind for kind in kinds if kind not in dict(drawn)]
        fitting = ((kind, draw_kwargs(rng, kind, seed, 1.0)) for kind in rng.sample(unused, len(unused)))
        plan["other"] = next(((kind, kwargs) for kind, kwargs in fitting if kwargs is not None), None)
        drawn = drawn if plan["other"] else []
    return plan if drawn else None


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
        constraints.append(
            {"kind": "code", "id": kind, "kwargs": kwargs, "text": text, "depends_on": [], "active": True}
        )
    thought = compose_thought(rng, seed, drawn, thoughts, plan["condition"]) if expert else ""
    if composition == "and":
        instruction = merge(rng, seed, [c["text"] for c in constraints])
    else:
        other = constraints.pop() | {"active": False} if plan["other"] else None
        constraints, sentences = compose(rng, language, composition, constraints, other, plan["condition"])
        joints = phrases()["joints"][language]
        instruction = f"{joints['space'].join(sentences)}\n\n{joints['label']}{seed['text']}"
    record = {
        "id": seed["id"],
        "source": "evolve",
        "task": "instruction",
        "language": language,
        "messages": [{"role": "user", "content": instruction}],
        "constraints": constraints,
        "composition": composition,
        **({"condition": plan["condition"]} if plan["condition"] else {}),
        **({"expert": f"<think>\n{thought}\n</think>\n<answer>\n{answer}\n</answer>"} if expert else {}),
        "seed": seed["id"],
        "topic": seed.get("topic", ""),
    }
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
            composition = "and" if cfg.compositions == "and" else random.Random(f"{stream}/form").choice(COMPOSITIONS)
            wanted = first or [kind for kind in seed.get("fits", ()) if kind in kinds]
            fresh = [[kind for kind in some if kind not in taken[seed["id"]]] for some in (kinds, wanted)]
            plan = draw_plan(rng, seed, tried, cfg, heldout=split != "train", kinds=fresh[0], first=fresh[1],
                             composition=composition)
            if plan is None:
                funnel[split]["no constraint fits"] += 1
            elif record := make_record(rng, seed, plan, thoughts, cfg, funnel[split]):
                records.append(record | ({"ood": bool(first)} if split != "train" else {}))
                taken[seed["id"]] |= {constraint["id"] for constraint in record["constraints"]}
                break
    return records


# ---------------------------------------------------------------- step 6: files and report


def mix_in_math(records: list[dict], cfg: Config, rng) -> list[dict]:
    if not cfg.math_ratio:
        return records
    math = [r for r in rewards.read_records(cfg.math or data_dir / "arithmetic.jsonl") if r.get("expert")]
    wanted = round(cfg.math_ratio * len(records))
    return records + rng.sample(math, min(wanted, len(math)))


def write_records(path: Path, records: list[dict], prefix: str) -> list[dict]:
    for number, record in enumerate((r for r in records if r["task"] == "instruction"), 1):
        record["id"] = f"{prefix}-{number:06d}"
    write_jsonl(path, records)
    return rewards.read_records(path)  # what the next stages will read, through their own validation


def report(funnel, files: dict[str, list[dict]]) -> str:
    lines = ["# Instruction evolution", "", "## Funnel", "", "| step | kept | dropped |", "|---|---|---|"]
    for step, counts in funnel.items():
        dropped = ", ".join(f"{reason} {n}" for reason, n in sorted(counts.items()) if not reason.startswith("kept"))
        lines.append(f"| {step} | {counts['kept']} | {dropped or '-'} |")
    lines += ["", "A request is tried up to three times per record; each failed try is counted.", "", "## Files", ""]
    lines += [
        "| file | records | 1, 2, 3 constraints | plain answer meets all | words: instruction | thought | answer |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for split, records in files.items():
        own = [record for record in records if record["task"] == "instruction"]
        if not own:
            continue
        parsed = [rewards.parse_response(record["expert"]) for record in own]
        sizes = Counter(len(record["constraints"]) for record in own)
        easy = funnel[split]["kept: the plain answer meets all"] / len(own)
        columns = [[r["messages"][0]["content"] for r in own], [p.think for p in parsed], [p.answer for p in parsed]]
        lengths = " | ".join(f"{mean(map(count_words, texts)):.0f}" for texts in columns)
        number = f"{len(own)} + {len(records) - len(own)} math" if len(records) > len(own) else len(own)
        lines.append(f"| {split} | {number} | {sizes[1]}, {sizes[2]}, {sizes[3]} | {easy:.0%} | {lengths} |")
    kinds = {
        split: Counter(c["id"] for r in records for c in r.get("constraints", [])) for split, records in files.items()
    }
    lines += ["", "## Records per kind", "", "| kind | " + " | ".join(files) + " |", "|---" * (len(files) + 1) + "|"]
    lines += [
        f"| {kind} | " + " | ".join(str(kinds[split][kind]) for split in files) + " |"
        for kind in CONSTRAINTS
        if any(kinds[split][kind] for split in files)
    ]
    return "\n".join(lines) + "\n"


def main(argv=None):
    cfg = parse_flags(Config, argv)
    rank, _ = init_distributed()
    folder = open_run(cfg.out, cfg, resume=True)
    funnel = {step: Counter() for step in ("requests", "drafts", "train", "held-out", "ood")}

    seeds = drop_duplicates(read_seeds(cfg), funnel)
    seeds.sort(key=lambda s: hashlib.sha256(f"{cfg.seed}/order/{s['id']}".encode()).digest())
    seeds = seeds[: cfg.limit or None]

    plain = write_drafts(seeds, cfg, folder)
    if rank:
        return  # the rest takes seconds
    usable = []
    for seed in seeds:
        text = plain[seed["id"]]
        draft, reason = (text, "") if seed.get("draft") else cut_draft(text, seed["language"], cfg.draft_words)
        funnel["drafts"]["kept" if draft else reason] += 1
        if draft:
            usable.append(seed | {"draft": draft, "plain": plain[seed["id"]]})

    known = {"laptop": LAPTOP_KINDS, "ifeval": rewards.COMPAT, "all": CONSTRAINTS}[cfg.kinds]
    left_out = OOD_KINDS if cfg.kinds == "all" else OOD_KINDS + IDLE_KINDS
    trained = [kind for kind in CONSTRAINTS if kind in known and kind not in left_out]
    train_seeds = [seed for seed in usable if not is_heldout(seed["id"], cfg)]
    heldout_seeds = [seed for seed in usable if is_heldout(seed["id"], cfg)]
    train = fill("train", train_seeds, cfg.uses, None, trained, (), cfg, funnel)
    heldout = fill("held-out", heldout_seeds, 3, cfg.heldout, trained, (), cfg, funnel)
    ood = fill("ood", heldout_seeds, 2, cfg.ood, trained, OOD_KINDS, cfg, funnel)
    if not train or not heldout + ood:
        raise InputError(
            f"{cfg.seeds or 'the shipped requests'}: {len(usable)} usable drafts from {len(seeds)} requests are "
            "too few for a training and a held-out file; raise --limit or take a model that writes sentences"
        )

    rng = random.Random(cfg.seed)
    train = rng.sample(train := mix_in_math(train, cfg, rng), len(train))
    mixed = rng.sample(heldout + ood, len(heldout + ood))
    write_records(folder / "train.jsonl", train, "ev")
    write_records(folder / "heldout.jsonl", mixed, "held")
    write_jsonl(folder / "metrics.jsonl", [{"step": i, "name": name, **funnel[name]} for i, name in enumerate(funnel)])
    text = report(funnel, {"train": train, "held-out": heldout, "ood": ood})
    write_atomic(folder / "report.md", text)
    print(text)


if __name__ == "__main__":
    launch(main)
