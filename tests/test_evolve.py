"""Stage 1 with a scripted draft writer: what is kept is right, the split is clean, the run is repeatable."""

import json
import random

import pytest

import evolve
from model import read_jsonl
from rewards import CONSTRAINTS, InputError, check, compatible, parse_response, read_records, render, score

OPENINGS = [
    "A calm morning is the best time to begin with this.",
    "Most people find that a little patience helps here.",
    "My neighbour once showed me a simple and cheap solution.",
    "There are many ways to look at this small question.",
]
MIDDLES = [
    "First, gather what is on the table, and keep the window open.",
    "The garden, the kitchen and the old street all play their part in it.",
    "A good friend can share the work, so the whole day feels lighter.",
    "Warm water and a soft cloth are often enough for the task.",
]
ENDINGS = ["In the evening, everything looks bright again.", "Later you will be glad that you took the time."]


def fake_drafts(requests, seeds):
    """Three plain sentences per request, the same for the same seed; every ninth draft is a list (to be dropped)."""
    texts = []
    for seed in seeds:
        rng = random.Random(seed)
        texts.append(
            " ".join(rng.choice(part) for part in (OPENINGS, MIDDLES, ENDINGS)) if seed % 9 else "- a\n- b\n- c"
        )
    return texts


@pytest.fixture(scope="module")
def run_evolve(tmp_path_factory):
    def run(name, *flags, generator=fake_drafts):
        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evolve, "local_generator", lambda cfg: generator)
            evolve.main(["--out", str(folder), *flags])
        return folder

    return run


@pytest.fixture(scope="module")
def folder(run_evolve):
    return run_evolve("en", "--limit", "60")


@pytest.fixture(scope="module")
def files(folder):
    return read_records(folder / "train.jsonl"), read_records(folder / "heldout.jsonl")


def test_every_expert_scores_three(files):
    for records in files:
        assert [s.total for s in score(records, [r["expert"] for r in records])] == [3.0] * len(records)


def test_ood_kinds_never_train(files):
    train, heldout = files
    assert len(set(evolve.OOD_KINDS)) >= 5 and set(evolve.OOD_KINDS) < set(CONSTRAINTS)
    trained = {c["id"] for r in train for c in r.get("constraints", [])}
    assert trained and not trained & set(evolve.OOD_KINDS)
    for record in heldout:
        assert record["ood"] == any(c["id"] in evolve.OOD_KINDS for c in record["constraints"])
    assert {record["ood"] for record in heldout} == {True, False}


def test_split_shares_no_request_and_no_wording(files):
    instructions = [[r for r in records if r["task"] == "instruction"] for records in files]
    seeds = [{r["seed"] for r in records} for records in instructions]
    assert seeds[0] and seeds[1] and not seeds[0] & seeds[1]
    for record in instructions[0] + instructions[1]:
        for c in record["constraints"]:
            total = len(CONSTRAINTS[c["id"]].wordings[record["language"]])
            reserved = range(total - max(1, total // 3), total)
            texts = {render(c["id"], c["kwargs"], record["language"], v) for v in reserved}
            assert (c["text"] in texts) == ("ood" in record)


def test_instruction_states_request_and_every_constraint(files):
    requests = {s["id"]: s["text"] for s in evolve.read_seeds(evolve.Config())}
    for record in [r for records in files for r in records if r["task"] == "instruction"]:
        instruction = record["messages"][0]["content"]
        assert requests[record["seed"]] in instruction
        for c in record["constraints"]:
            assert c["text"].rstrip(".")[1:] in instruction
        kinds = [c["id"] for c in record["constraints"]]
        assert 1 <= len(kinds) == len(set(kinds)) <= 3


def test_math_ratio(files):
    train, heldout = files
    math = sum(r["task"] == "math" for r in train)
    assert math == round(evolve.Config().math_ratio * (len(train) - math))
    assert all(r["task"] == "instruction" for r in heldout)


def test_same_seed_same_files_and_finished_drafts_are_kept(run_evolve, folder, monkeypatch):
    again = run_evolve("again", "--limit", "60")
    other = run_evolve("other", "--limit", "60", "--seed", "1")
    names = ["train.jsonl", "heldout.jsonl", "drafts.jsonl", "report.md", "metrics.jsonl"]
    before = [(folder / name).read_bytes() for name in names]
    assert [(again / name).read_bytes() for name in names] == before
    assert (other / "train.jsonl").read_bytes() != before[0]
    monkeypatch.setattr(evolve, "local_generator", lambda cfg: pytest.fail("drafts were written twice"))
    evolve.main(["--out", str(folder), "--limit", "60"])
    assert [(folder / name).read_bytes() for name in names] == before


def test_chinese(run_evolve):
    train = [
        r for r in read_records(run_evolve("zh", "--language", "zh") / "train.jsonl") if r["task"] == "instruction"
    ]
    assert len(train) > 30 and {r["language"] for r in train} == {"zh"}
    for record in train:
        answer = record["expert"].split("<answer>\n")[1].removesuffix("\n</answer>")
        assert all(check(c["id"], c["kwargs"], answer) for c in record["constraints"])


def test_near_duplicates_are_dropped_and_counted():
    texts = [
        "Write a short note about the old bridge in our town, please.",
        "Write a short note about the old bridge in our town please!",
        "Write a short note about the old bridge in our town, thanks.",
        "How do bees make honey?",
    ]
    funnel = {"requests": evolve.Counter()}
    kept = evolve.drop_duplicates([{"text": text} for text in texts], funnel)
    assert [seed["text"] for seed in kept] == [texts[0], texts[3]]
    assert funnel["requests"] == {"exact duplicate": 1, "near duplicate": 1}


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "One plain sentence stands here with enough words. And it never ends",
            "One plain sentence stands here with enough words.",
        ),
        (
            "I asked Mrs. Miller about the old tree near the station.",
            "I asked Mrs. Miller about the old tree near the station.",
        ),
        ("A tale, a tale, a tale, a tale, a tale, a tale, a tale.", None),
        ("Here is a list:\n1. One thing.\n2. Another thing.", None),
        ("As an AI, there is nothing that I would like to say about that.", None),
    ],
)
def test_cut_draft(text, expected):
    draft, reason = evolve.cut_draft(text, "en", 45)
    assert draft == expected and (draft is None) == bool(reason)


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "is empty"),
        (["{"], ":1: is not JSON"),
        ([{"id": "a", "language": "en", "text": "Why?"}, {"id": "b", "language": "en"}], ":2: field 'text'"),
        ([{"id": "a", "language": "fr", "text": "Pourquoi ?"}], ":1: field 'language'"),
        ([{"id": "a", "language": "zh", "text": "为什么？"}], ":1: field 'draft'"),
        ([{"id": "a", "language": "en", "text": "Why?"}] * 2, ":2: field 'id'"),
    ],
)
def test_bad_seed_line_is_named(tmp_path, lines, message):
    path = tmp_path / "seeds.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    with pytest.raises(InputError, match=message):
        evolve.read_seeds(evolve.Config(seeds=str(path)))


@pytest.fixture(scope="module")
def full(run_evolve):
    folder = run_evolve("all", "--kinds", "all", "--language", "both", "--compositions", "all")
    return [r for name in ("train", "heldout") for r in read_records(folder / f"{name}.jsonl") if r["task"] != "math"]


def test_all_kinds_compositions_and_languages(full):
    assert {c["id"] for r in full for c in r["constraints"] if c["active"]} == set(CONSTRAINTS)
    forms = {(r["language"], r["composition"]) for r in full}
    assert forms == {(language, form) for language in ("en", "zh") for form in evolve.COMPOSITIONS}


def test_every_active_constraint_holds_and_branches_are_what_the_condition_says(full):
    """Re-checked from the record alone: no helper of evolve.py has a say."""
    seen = set()
    for record in full:
        prompt, answer = record["messages"][0]["content"], parse_response(record["expert"]).answer
        active = [c for c in record["constraints"] if c["active"]]
        assert all(check(c["id"], c["kwargs"], answer, prompt=prompt) for c in active)
        first = record["constraints"]
        depends = [c["depends_on"] for c in first]
        if record["composition"] == "and":
            assert len(active) == len(first) and not any(depends) and "condition" not in record
            continue
        for c in first:
            assert c["text"].rstrip(".。")[1:] in prompt
        if record["composition"] == "chain":
            assert depends == [[i - 1] if i else [] for i in range(len(first))] and len(first) > 1
            continue
        condition, rest = record["condition"], prompt.split("\n\n", 1)[1]
        request = rest.split(":" if record["language"] == "en" else "：", 1)[1]
        if "question mark" in condition["if"] or "问号" in condition["if"]:
            assert condition["holds"] == request.endswith(("?", "？"))
        if "comma" in condition["if"] or "逗号" in condition["if"]:
            assert condition["holds"] == ("," in request or "，" in request)
        assert condition["if"] in prompt and condition["why"] in record["expert"]
        off = [i for i, c in enumerate(first) if not c["active"]]
        assert compatible([c["id"] for c in first[:-3]] + [first[off[0]]["id"]])
        assert len(off) == 1 and off[0] >= len(first) - (3 if record["composition"] == "nested" else 2)
        assert (off[0] == len(first) - 1) == condition["holds"]  # the branch after "otherwise" comes last
        if record["composition"] == "nested":
            assert any(depends) and all(first[j]["active"] for d in depends for j in d)
        seen.add((record["composition"], condition["holds"]))
    assert len(seen) == 4


def test_up_to_five_constraints(run_evolve):
    weights = [flag for n, weight in enumerate("00011", 1) for flag in (f"--weight-{n}", weight)]
    folder = run_evolve("five", "--language", "zh", "--kinds", "all", *weights, "--heldout", "10", "--ood", "0")
    sizes = [len(r["constraints"]) for r in read_records(folder / "train.jsonl") if r["task"] == "instruction"]
    assert max(sizes) == 5 and sizes.count(4) + sizes.count(5) > len(sizes) / 2


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def test_requests_of_other_forms(tmp_path):
    chat = [{"role": "user", "content": "How do I dry herbs at home?"}, {"role": "assistant", "content": "Hang them."}]
    rows = [
        {"conversation": chat, "language": "English", "toxic": False},
        {"conversation": [{"role": "user", "content": "What is in the bad box today?"}], "toxic": True},
        {"conversations": [{"from": "human", "value": "Why is the sky blue in the day?"}]},
        {"instruction": "Sort these words for me.", "input": "pear, apple, fig", "output": "apple, fig, pear"},
        {"instruction": "Write it in plain words.", "instances": [{"input": "Utilise the lift.", "output": "…"}]},
        {"prompt": "Wie trockne ich Kräuter am besten zu Hause auf dem Balkon?"},
        {"prompt": "怎样在家里晾干香草？请说得简单一点。"},
        {"messages": [{"role": "system", "content": "x"},
                      {"role": "user", "content": "Name a good tool for the garden."}]},
        {"prompt": "Do it."},
        {"prompt": "is it so, " * 400},
    ]
    counts = evolve.Counter()
    cfg = evolve.Config(seeds=write(tmp_path / "mixed.jsonl", rows), language="both")
    texts = [seed["text"] for seed in evolve.read_seeds(cfg, counts)]
    assert texts == ["How do I dry herbs at home?", "Why is the sky blue in the day?",
                     "Sort these words for me.\n\npear, apple, fig", "Write it in plain words.\n\nUtilise the lift.",
                     "Name a good tool for the garden."]
    assert counts["toxic"] == counts["other language"] == counts["Chinese, and no model to answer it"] == 1
    assert counts["too short"] + counts["too long"] + counts["other language"] == 3
    cfg = evolve.Config(seeds=cfg.seeds, language="zh", llm="toy")
    assert [seed["text"] for seed in evolve.read_seeds(cfg)] == [rows[6]["prompt"]]

    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist([{"conversation": chat}]), tmp_path / "chat.parquet")
    (tmp_path / "list.json").write_text(json.dumps(rows[2:4]))
    assert len(evolve.read_seeds(evolve.Config(seeds=str(tmp_path / "chat.parquet")))) == 1
    assert len(evolve.read_seeds(evolve.Config(seeds=str(tmp_path / "list.json")))) == 2


@pytest.mark.parametrize("name, content, message", [
    ("rows.jsonl", '{"prompt": "What is a comet?"}\n[1]', ":2: not a JSON object"),
    ("rows.jsonl", '{"conversation": [{"role": "assistant", "content": "Hello."}]}', ":1: no text"),
    ("rows.jsonl", '{"conversation": ["Hello."]}', ":1: no text"),
    ("rows.jsonl", '{"instruction": 3, "input": "x"}', ":1: no text"),
    ("rows.json", '[{"prompt": "What is a comet?"}', ":1: is not JSON"),
    ("rows.parquet", "PAR1", "is not Parquet"),
    ("missing.parquet", None, "cannot be read"),
])
def test_bad_rows_of_other_forms_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        evolve.read_seeds(evolve.Config(seeds=str(path)))


def test_a_data_set_of_the_hub_is_streamed(monkeypatch):
    def load_dataset(name, *, split, streaming):
        if name != "someone/chats":
            raise ConnectionError("not found")
        assert split == "train" and streaming
        return ({"conversation": [{"role": "user", "content": f"What is the name of star {i}?"}]} for i in range(10**9))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    seeds = evolve.read_seeds(evolve.Config(seeds="someone/chats", rows=3))
    assert [seed["id"] for seed in seeds] == ["chats-1", "chats-2", "chats-3"]
    with pytest.raises(InputError, match="neither a file nor a data set"):
        evolve.read_seeds(evolve.Config(seeds="someone/else"))


def test_tags_by_keyword_and_cap_per_ability():
    texts = ["Write a poem about rain.", "Translate this line.", "A poem on tea, please.", "Zzz qqq vvv."]
    seeds = [{"id": str(i), "language": "en", "text": text} for i, text in enumerate(texts)]
    counts = evolve.Counter()
    chosen = evolve.choose(seeds, None, evolve.Config(ability_cap=1), counts)
    assert [(seed["id"], seed["ability"]) for seed in chosen] == [("0", "poem"), ("1", "translation"), ("3", "other")]
    assert counts["over the cap of its ability"] == 1


def test_contamination_is_dropped_and_listed(tmp_path):
    (tmp_path / "sub").mkdir()
    boat = "in detail how a paper boat is folded so that it floats for a long while"
    (tmp_path / "sub" / "bench.json").write_text(json.dumps([{"turns": [{"q": f"Please tell me {boat}."}]}]))
    write(tmp_path / "zh.jsonl", [{"prompt": "请用不超过三句话介绍一下这座城市最有名的桥。"}])
    cfg = evolve.Config(benchmark_dir=str(tmp_path))
    rows = [
        {"id": "a", "text": f"Hello! I ask {boat}, please?"},
        {"id": "b", "text": "Please tell me how a kite is folded so that it flies."},
        {"id": "c", "text": "你好，请用不超过三句话介绍一下这座城市最有名的桥，谢谢。"},
        {"id": "d", "messages": [{"role": "user", "content": f"Tell me {boat}."}]},
    ]
    hits = []
    clean = evolve.drop_contaminated(rows, evolve.read_benchmarks(cfg), cfg, hits)
    assert [row["id"] for row in clean] == ["b"]
    found = [(hit["id"], hit["file"]) for hit in hits]
    assert found == [("a", "sub/bench.json"), ("c", "zh.jsonl"), ("d", "sub/bench.json")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no"):
        evolve.read_benchmarks(evolve.Config(benchmark_dir=str(tmp_path / "empty")))


def test_math_rows(tmp_path):
    rows = [
        {"problem": "What is half of 7?", "answer": "\\frac{7}{2}", "difficulty": 1.0},
        {"question": "Ann has 3 boxes of 400 pens. How many?", "answer": "3 x 400 = <<3*400=1200>>1200\n#### 1,200"},
        {"problem": "What is 2 + 2?", "solution": "We add: $\\boxed{4}$."},
    ]
    records = evolve.math_records(write(tmp_path / "m.jsonl", rows))
    assert [record["answer"] for record in records] == ["\\frac{7}{2}", "1200", "4"]
    assert all("\\boxed{}" in record["messages"][0]["content"] for record in records)
    write_back = write(tmp_path / "records.jsonl", records)
    assert read_records(write_back) == evolve.math_records(write_back)
    with pytest.raises(InputError, match=":1: fields 'problem'"):
        evolve.math_records(write(tmp_path / "bad.jsonl", [{"problem": "What?"}]))


def test_released_raif_files(tmp_path):
    """Rows invented after the description of the formats (method.md section 6)."""
    def qwen(text):
        turns = [("system", "Think first."), ("user", text)]
        shown = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
        return f"{shown}<|im_start|>assistant\n<think>\n"

    kwargs = [{"num_words": None, "keywords": ["tea"]}, None]
    rl = [
        {"input": qwen("What is 3 + 4?"), "task": "default", "target": "7"},
        {"input": qwen("Write about tea, without commas."), "task": "ifeval_1", "target": json.dumps(
            {"instruction_id_list": ["keywords:existence", "punctuation:no_comma"], "kwargs": kwargs, "score": 0.5})},
        {"input": "<｜User｜>写一首温柔的小诗。<｜Assistant｜>", "task": "complex_zh",
         "target": {"scoring_questions": ["语气温柔吗？", "是诗吗？"]}},
        {"input": qwen("Write <x>."), "task": "ifeval_2",
         "target": {"instruction_id_list": ["odd:kind"], "kwargs": [{}]}},
    ]
    sft = [
        {"question": qwen("Write about tea, without commas."),
         "answer": "Short.\n</think>\n<answer>Tea is warm.</answer>"},
        {"question": "<｜User｜>Name a river.<｜Assistant｜>", "answer": "<think>\nOne.\n</think>\nThe Danube."},
    ]
    out = tmp_path / "out"
    files = write(tmp_path / "rl.jsonl", rl) + "," + write(tmp_path / "sft.jsonl", sft)
    evolve.main(["--raif", files, "--out", str(out)])
    records = read_records(out / "train.jsonl")
    assert [r["task"] for r in records] == ["math", "instruction", "instruction", "instruction"]
    assert [r["messages"][0]["content"] for r in records][::3] == ["What is 3 + 4?", "Name a river."]
    assert records[0]["answer"] == "7" and records[2]["language"] == "zh"
    assert [c["question"] for c in records[2]["constraints"]] == ["语气温柔吗？", "是诗吗？"]
    assert [c["kwargs"] for c in records[1]["constraints"]] == [{"keywords": ["tea"]}, {}]
    assert score([records[1]], [records[1]["expert"]])[0].total == 3.0
    assert parse_response(records[3]["expert"]).format_ok
    counts = evolve.Counter()
    evolve.raif_records(str(tmp_path / "rl.jsonl"), counts)
    assert counts["dropped: unknown constraint odd:kind"] == 1
    rl[2]["target"] = "not JSON"
    with pytest.raises(InputError, match=":3: field 'target'"):
        evolve.raif_records(write(tmp_path / "bad.jsonl", rl), counts)


def test_dry_run_prints_the_steps_and_leaves_the_files_alone(run_evolve, capsys):
    folder = run_evolve("dry", "--dry-run", "3")
    printed = capsys.readouterr().out
    assert printed.count("=" * 100) == 3 and "[0-requests]" in printed and "plain: " in printed
    assert not (folder / "train.jsonl").exists()
    assert len(read_jsonl(folder / "dry-run" / "steps" / "0-requests.jsonl")) == 3
