"""Stage 1 with the recorded teacher, and what does not need a model: reading, splitting, cleaning, converting."""

import hashlib
import json
from collections import Counter

import pytest
from conftest import ROOT

import evolve
from model import read_jsonl
from rewards import CONSTRAINTS, InputError, check, compatible, parse_response, read_records, score

FILES = {name: read_records(ROOT / "data" / f"{name}.jsonl") for name in ("teacher", "rl", "dev", "heldout")}
MORE = read_records(ROOT / "data" / "teacher_more.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    evolve.main(["--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def files(folder):
    return {split: read_records(folder / f"{split}.jsonl") for split in evolve.SPLITS}


def instructions(records):
    return [record for record in records if record["task"] == "instruction"]


def funnel_of(folder):
    return {row["name"]: row for row in read_jsonl(folder / "metrics.jsonl")}


# ---------------------------------------------------------------- the data


def test_sizes_and_splits_of_the_shipped_rows():
    assert {name: len(rows) for name, rows in FILES.items()} == {"teacher": 450, "rl": 192, "dev": 120, "heldout": 300}
    splits = {"teacher": "train", "rl": "rl", "dev": "dev", "heldout": "heldout"}
    for name, rows in FILES.items():
        assert {row["split"] for row in rows} == {splits[name]}
        assert len({row["id"] for row in rows}) == len({row["messages"][0]["content"] for row in rows}) == len(rows)
    assert sum("expert" in row for row in FILES["dev"]) == 60
    assert all("expert" in row for row in FILES["teacher"]) and not any("expert" in row for row in FILES["rl"])
    yes_no = [c for row in FILES["teacher"] for c in row["constraints"] if "constrained" in c["id"]]
    assert len(yes_no) >= 25 + 4


@pytest.mark.parametrize("seed", range(5))
def test_no_request_is_on_two_sides_whatever_the_seed(seed, tmp_path):
    evolve.main(["--out", str(tmp_path), "--seed", str(seed), "--limit", "25"])
    records = {split: instructions(read_records(tmp_path / f"{split}.jsonl")) for split in evolve.SPLITS}
    sides = [{(r["seed"], r["request"]) for r in records[split]} for split in evolve.SPLITS]
    assert all(sides) and sum(map(len, sides)) == len(set.union(*sides))
    for split, rows in records.items():  # the constant hash and the data agree, so that own requests keep the sides
        assert all(evolve.split_of(r["seed"]) == split for r in rows if r["seed"].startswith("en-"))
    ids = {split: [r["id"] for r in rows] for split, rows in records.items()}
    assert sorted(ids["train"]) == sorted(r["id"] for r in FILES["teacher"][:25])


def test_ood_types_are_in_held_out_records_alone():
    assert len(set(evolve.OOD_TYPES)) == 18 and set(evolve.OOD_TYPES) < set(CONSTRAINTS)
    for name, rows in FILES.items():
        for row in rows:
            asked = {c["id"] for c in row["constraints"]}
            assert bool(asked & set(evolve.OOD_TYPES)) == bool(name == "heldout" and row["ood"])
    assert sum(row["ood"] for row in FILES["heldout"]) == 100


def test_the_held_out_file_is_frozen_and_chance_is_low():
    digest, name = (ROOT / "data" / "SHA256SUMS").read_text().split()
    assert hashlib.sha256((ROOT / "data" / name).read_bytes()).hexdigest() == digest and name == "heldout.jsonl"
    assert max(row["chance"] for row in FILES["heldout"]) <= 0.1


def test_every_expert_scores_three_in_both_modes_and_every_witness_passes():
    rows = [row for name in FILES for row in FILES[name]]
    for mode in ("unicode", "compat"):
        answered = [row for row in rows if "expert" in row]
        assert {s.total for s in score(answered, [row["expert"] for row in answered], mode=mode)} == {3.0}
        for row in rows:
            for c in row["constraints"] if "witness" in row else ():
                assert check(c["id"], c["kwargs"], row["witness"], mode=mode), row["id"]
    assert all(("witness" in row) != ("expert" in row) for row in rows)


def test_more_rows_hold_all_compositions_judged_constraints_and_chinese():
    forms = Counter((row["language"], row["composition"]) for row in MORE)
    structured = {language: sum(n for (own, form), n in forms.items() if own == language and form != "and")
                  for language in ("en", "zh")}
    assert structured == {"en": 20, "zh": 10} and len(forms) == 8
    judged = [row["id"] for row in MORE for c in row["constraints"]
              if row["composition"] == "and" and c["kind"] == "judge"]
    assert len(set(judged)) == 20 and forms["zh", "and"] == 20
    scores = score(MORE, [row["expert"] for row in MORE], judge=lambda items: [True] * len(items))
    assert {s.total for s in scores} == {3.0}
    for row in MORE:
        depends, active = ([c[name] for c in row["constraints"]] for name in ("depends_on", "active"))
        assert (not all(active)) == ("condition" in row)
        if row["composition"] in ("chain", "nested"):
            assert any(depends), row["id"]
        if row["composition"] == "selection":
            assert "condition" in row


# ---------------------------------------------------------------- the recorded teacher


def test_the_default_run_keeps_every_row_and_adds_math(files, folder):
    funnel = funnel_of(folder)
    for split, name in (("train", "teacher"), ("rl", "rl"), ("dev", "dev"), ("heldout", "heldout")):
        assert sorted(r["id"] for r in instructions(files[split])) == sorted(r["id"] for r in FILES[name])
    assert funnel["comparison"] == {"step": 3, "name": "comparison", evolve.NOT_ASKED: 1062}  # nobody was asked
    assert funnel["expert"]["kept"] == 510 and funnel["expert"][evolve.NOT_ASKED] == 552
    for name in ("hallucination", "undefined", "contradiction", "unsafe"):
        assert "kept" not in funnel[f"filter: {name}"]
    math = {split: [r for r in files[split] if r["task"] == "math"] for split in files}
    assert len(math["rl"]) == 19 and len(math["train"]) == 45 and not math["dev"] + math["heldout"]
    assert not {r["id"] for r in math["rl"]} & {r["id"] for r in math["train"]}
    originals = {row["id"]: row for row in FILES["teacher"] + FILES["heldout"]}
    for record in instructions(files["train"]) + files["heldout"]:
        assert record["messages"] == originals[record["id"]]["messages"]
    for record in instructions(files["train"]):
        assert record["expert"] == originals[record["id"]]["expert"]


def test_the_same_seed_gives_the_same_files(folder, tmp_path):
    evolve.main(["--out", str(tmp_path)])
    for name in ("train.jsonl", "rl.jsonl", "dev.jsonl", "heldout.jsonl", "report.md", "metrics.jsonl"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def recorded(tmp_path, rows, *flags):
    """The funnel after a run on these recorded rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    evolve.main(["--recorded", str(path), "--out", str(tmp_path / "out"), *flags])
    return funnel_of(tmp_path / "out")


def test_a_recorded_row_goes_through_the_checks_of_any_reply(tmp_path):
    good, conflict, wrong, untagged, prompt, witness = (json.loads(json.dumps(row)) for row in (
        FILES["teacher"][0], FILES["teacher"][1], FILES["teacher"][2], FILES["teacher"][3], FILES["rl"][0],
        FILES["rl"][1]))
    code = {"kind": "code", "kwargs": {}, "text": "x", "depends_on": [], "active": True}
    conflict["constraints"] = [code | {"id": f"change_case:english_{case}"} for case in ("capital", "lowercase")]
    wrong["constraints"] = [code | {"id": "keywords:last_word", "kwargs": {"word": "zebra"}}]
    untagged["expert"] = "An answer without any thought."
    witness["witness"] = "x"
    funnel = recorded(tmp_path, [good, conflict, wrong, untagged, prompt, witness], "--math-ratio", "0")
    assert funnel["constraints"]["none fits, or they conflict"] == 1
    assert funnel["expert"]["no answer passed the code checks"] == 1
    assert funnel["expert"]["no reply with thought and answer"] == 1
    assert funnel["expert"]["its witness fails the checks"] == 1
    kept = {split: [r["id"] for r in read_records(tmp_path / "out" / f"{split}.jsonl")] for split in ("train", "rl")}
    assert kept == {"train": [good["id"]], "rl": [prompt["id"]]}


def test_all_compositions_go_through_and_judge_questions_count_as_not_asked(tmp_path):
    funnel = recorded(tmp_path, MORE)
    asked = sum(c["kind"] == "judge" and c["active"] for row in MORE for c in row["constraints"])
    assert funnel["judge questions"] == {"step": funnel["judge questions"]["step"], "name": "judge questions",
                                         evolve.NOT_ASKED: asked}
    train = instructions(read_records(tmp_path / "out" / "train.jsonl"))
    assert {r["id"] for r in train} == {r["id"] for r in MORE}


def test_types_and_lengths_choose_among_recorded_rows_and_the_others_are_counted(tmp_path):
    funnel = recorded(tmp_path, FILES["teacher"], "--types", "punctuation:no_comma,change_case:english_capital",
                      "--max-constraints", "1", "--answer-words", "50", "--math-ratio", "0")
    train = read_records(tmp_path / "out" / "train.jsonl")
    assert {tuple(c["id"] for c in r["constraints"]) for r in train} == {
        ("punctuation:no_comma",), ("change_case:english_capital",)}
    assert max(evolve.count_words(parse_response(r["expert"]).answer) for r in train) <= 50
    dropped = funnel["recorded rows"]["not of --types, --max-constraints, --answer-words"]
    assert dropped == 450 - len(train) and funnel["recorded rows"]["kept"] == len(train)
    with pytest.raises(InputError, match="--types: 'no_such:type' is unknown"):
        recorded(tmp_path, FILES["teacher"], "--types", "no_such:type")


def test_the_lesson_preset_of_every_stage_reads_what_the_one_before_writes(tmp_path):
    import evaluate
    import grpo
    import sft

    lessons = {module.__name__: module.PRESETS["lesson"] for module in (evolve, sft, grpo, evaluate)}
    out = lessons["evolve"]["out"]
    assert lessons["sft"]["records"] == f"{out}/train.jsonl" and lessons["grpo"]["records"] == f"{out}/rl.jsonl"
    assert lessons["grpo"]["model"] == lessons["evaluate"]["sft_model"] == f"{lessons['sft']['out']}/model"
    assert lessons["evaluate"]["ours_model"] == f"{lessons['grpo']['out']}/model"
    assert lessons["evaluate"]["benchmarks"] == f"{out}/heldout.jsonl"
    evolve.main(["--preset", "lesson", "--out", str(tmp_path)])
    for split in evolve.SPLITS:
        records = read_records(tmp_path / f"{split}.jsonl")
        assert len(records) > 5 and all(len(r["constraints"]) == 1 for r in records)
    assert len({c["id"] for r in read_records(tmp_path / "train.jsonl") for c in r["constraints"]}) == 4


def test_rows_of_ones_own_need_no_split_and_reach_every_stage(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "split"} for row in FILES["teacher"][:6]]
    rows[0]["expert"] = None  # a prompt alone
    rows[1]["messages"] = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."},
                           *rows[1]["messages"]]
    del rows[2]["language"]
    recorded(tmp_path, rows, "--math-ratio", "0")
    files = {split: read_records(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "rl")}
    assert [r["id"] for r in files["rl"]] == [rows[0]["id"]]  # there is nothing to clone in it
    assert sorted(r["id"] for r in files["train"]) == sorted(r["id"] for r in rows[1:])
    assert next(r for r in files["train"] if r["id"] == rows[1]["id"])["messages"] == rows[1]["messages"]
    recorded(tmp_path, rows[1:], "--math-ratio", "0")  # without prompts of its own RL takes those of the experts
    again = read_records(tmp_path / "out" / "rl.jsonl")
    assert len(again) == 5 and not any("expert" in r for r in again)


def test_what_an_earlier_run_left_does_not_pass_for_this_ones(tmp_path):
    recorded(tmp_path, FILES["teacher"][:4] + FILES["dev"][:2])
    assert (tmp_path / "out" / "dev.jsonl").exists()
    (tmp_path / "out" / "steps" / "0-x.jsonl.1.2.tmp").write_text("{")
    recorded(tmp_path, FILES["teacher"][:4])
    assert not (tmp_path / "out" / "dev.jsonl").exists()
    assert (tmp_path / "out" / "steps" / "0-constraints.jsonl").exists()


def test_half_an_emoji_is_an_error_in_a_file_and_unusable_in_a_reply(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(FILES["teacher"][0] | {"request": "Tea \ud83d"}) + "\n")
    with pytest.raises(InputError, match="rows.jsonl:1: is not JSON"):
        evolve.main(["--recorded", str(path), "--out", str(tmp_path / "out")])
    reply = evolve.Completion([], '{"instruction": "Write of tea \\ud83d please"}', "stop")
    assert evolve.read_json(reply, "instruction") is None


@pytest.mark.parametrize("text, word", [("True.", "true"), ("It is true", "true"), ("Not true.", None), ("maybe", None),
                                        ("false, as true things go", "false"), ("true or false?", "true")])
def test_the_word_of_a_verdict(text, word):
    assert evolve.read_word(evolve.Completion([], text, "stop"), "true|false") == word


def test_a_record_file_as_requests_keeps_their_side(tmp_path):
    seeds = seeds_of(evolve.Config(seeds=write(tmp_path / "h.jsonl", FILES["heldout"][:9])))
    assert {evolve.split_of(seed["id"]) for seed in seeds} == {"heldout"}
    assert {seed["text"] for seed in seeds} == {row["request"] for row in FILES["heldout"][:9]}
    with pytest.raises(InputError, match="is no math record"):
        evolve.math_records(write(tmp_path / "h.jsonl", FILES["heldout"][:9]))


def test_two_recorded_rows_of_one_id_and_an_unknown_split_are_named(tmp_path):
    row = FILES["teacher"][0]
    with pytest.raises(InputError, match=":2: field 'id'"):
        recorded(tmp_path, [row, row])
    for wrong, message in [({"split": "test"}, "'split': 'test'"), ({"witness": 5}, "'witness': is not a text"),
                           ({"condition": 3}, "'condition'"), ({"task": "math", "answer": "3"}, "'task': 'math'")]:
        with pytest.raises(InputError, match=f"rows.jsonl: record 't-0000': field {message}"):
            recorded(tmp_path, [row | wrong])


@pytest.mark.parametrize("given, message", [
    (["--seeds", "mine.jsonl"], "--llm NAME@URL .* --llm NAME .*--recorded FILE"), (["--expert", "a"], "--llm"),
    (["--judge", "a"], "--llm"), (["--recorded", "a", "--llm", "b"], "give one"), (["--limit", "-2"], "at least 0"),
    (["--tries", "0"], "at least 1"), (["--judge-share", "2"], "from 0 to 1"),
    (["--raif", "a", "--dry-run", "2"], "--raif: only turns files"),
])
def test_flags_that_need_each_other(given, message, tmp_path):
    with pytest.raises(InputError, match=message):
        evolve.main([*given, "--out", str(tmp_path)])


def test_constraints_that_the_conflict_table_keeps_apart_are_not_consistent():
    code = {"kind": "code", "kwargs": {}, "text": "x", "depends_on": [], "active": True}
    pair = [code | {"id": "change_case:english_capital"}, code | {"id": "change_case:english_lowercase"}]
    assert not evolve.consistent({"constraints": pair}) and not compatible([c["id"] for c in pair])
    pair[1]["depends_on"] = [0]  # a later step on the product of an earlier one
    assert evolve.consistent({"constraints": pair})
    pair[1] |= {"active": False, "depends_on": []}  # another branch
    assert evolve.consistent({"constraints": pair}) and not evolve.consistent({"constraints": []})


def test_an_empty_outcome_is_a_clear_message(tmp_path):
    row = FILES["teacher"][0] | {"expert": "no tags"}
    with pytest.raises(InputError, match="none came through; the funnel in .*report.md"):
        recorded(tmp_path, [row])
    assert "no reply with thought and answer 1" in (tmp_path / "out" / "report.md").read_text("utf-8")


# ---------------------------------------------------------------- requests


def seeds_of(cfg):
    return evolve.read_seeds(cfg, Counter())


def test_near_duplicates_are_dropped_and_counted():
    texts = [
        "Write a short note about the old bridge in our town, please.",
        "Write a short note about the old bridge in our town please!",
        "Write a short note about the old bridge in our town, thanks.",
        "How do bees make honey?",
    ]
    counts = Counter()
    kept = evolve.drop_duplicates([{"text": text} for text in texts], counts)
    assert [seed["text"] for seed in kept] == [texts[0], texts[3]]
    assert counts == {"exact duplicate": 1, "near duplicate": 1}


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "is empty"),
        (["{"], ":1: is not JSON"),
        ([{"id": "a", "language": "en", "text": "Why?"}, {"id": "b", "language": "en"}], ":2: field 'text'"),
        ([{"id": "a", "language": "fr", "text": "Pourquoi ?"}], ":1: field 'language'"),
        ([{"id": "a", "language": "en", "text": "Why?"}] * 2, ":2: field 'id'"),
    ],
)
def test_bad_seed_line_is_named(tmp_path, lines, message):
    path = tmp_path / "seeds.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    with pytest.raises(InputError, match=message):
        seeds_of(evolve.Config(seeds=str(path)))


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
    counts = Counter()
    cfg = evolve.Config(seeds=write(tmp_path / "mixed.jsonl", rows))
    texts = [seed["text"] for seed in evolve.read_seeds(cfg, counts)]
    assert texts == ["How do I dry herbs at home?", "Why is the sky blue in the day?",
                     "Sort these words for me.\n\npear, apple, fig", "Write it in plain words.\n\nUtilise the lift.",
                     "Name a good tool for the garden."]
    assert counts["toxic"] == counts["other language"] == counts["not in --language"] == 1
    assert counts["too short"] + counts["too long"] + counts["other language"] == 3
    cfg = evolve.Config(seeds=cfg.seeds, language="zh")
    assert [seed["text"] for seed in seeds_of(cfg)] == [rows[6]["prompt"]]

    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist([{"conversation": chat}]), tmp_path / "chat.parquet")
    (tmp_path / "list.json").write_text(json.dumps(rows[2:4]))
    assert len(seeds_of(evolve.Config(seeds=str(tmp_path / "chat.parquet")))) == 1
    assert len(seeds_of(evolve.Config(seeds=str(tmp_path / "list.json")))) == 2


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
        seeds_of(evolve.Config(seeds=str(path)))


def test_a_data_set_of_the_hub_is_streamed(monkeypatch):
    def load_dataset(name, *, split, streaming):
        if name != "someone/chats":
            raise ConnectionError("not found")
        assert split == "train" and streaming
        return ({"conversation": [{"role": "user", "content": f"What is the name of star {i}?"}]} for i in range(10**9))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    seeds = seeds_of(evolve.Config(seeds="someone/chats", rows=3))
    assert [seed["text"] for seed in seeds] == [f"What is the name of star {i}?" for i in range(3)]
    assert len({seed["id"] for seed in seeds}) == 3 and all(seed["id"].startswith("chats-") for seed in seeds)
    with pytest.raises(InputError, match="neither a file nor a data set"):
        seeds_of(evolve.Config(seeds="someone/else"))


def test_tags_topics_and_the_cap_per_ability():
    """A tag that is missing is asked for; requests outside the paper's topics, and those over the cap, are counted."""
    texts = ["Write a poem about rain.", "Translate this line.", "A poem on tea, please.", "Zzz qqq vvv.", "Hm?"]
    seeds = [{"id": str(i), "language": "en", "text": text} for i, text in enumerate(texts)]
    seeds.append(seeds[0] | {"id": "5", "topic": "own", "ability": "own"})
    replies = {"poem": '{"topic": "creativity and design", "ability": "poem"}', "Hm?": "no JSON",
               "Translate": '{"topic": "nlp and understanding", "ability": "translation"}', "Zzz": '{"topic": "other"}'}

    def ask(step, items, write, read):
        assert step == "tag" and all(item["text"] in write(item) for item in items)
        texts = [next(text for word, text in replies.items() if word in item["text"]) for item in items]
        return [read(item, evolve.Completion([], text, "stop")) for item, text in zip(items, texts, strict=True)]

    counts = Counter()
    chosen = evolve.choose(seeds, ask, evolve.Config(ability_cap=1), counts)
    assert [(seed["id"], seed["ability"]) for seed in chosen] == [("0", "poem"), ("1", "translation"), ("5", "own")]
    assert counts == {"over the cap of its ability": 1, "other topic": 1, "no tag": 1, "kept": 3}


def test_contamination_is_dropped_and_listed(tmp_path):
    (tmp_path / "sub").mkdir()
    boat = "in detail how a paper boat is folded so that it floats for a long while"
    (tmp_path / "sub" / "bench.json").write_text(json.dumps([{"turns": [{"q": f"Please tell me {boat}."}]}]))
    write(tmp_path / "zh.jsonl", [{"prompt": "请用不超过三句话介绍一下这座城市最有名的桥。"}])
    rows = [
        {"id": "a", "text": f"Hello! I ask {boat}, please?"},
        {"id": "b", "text": "Please tell me how a kite is folded so that it flies."},
        {"id": "c", "text": "你好，请用不超过三句话介绍一下这座城市最有名的桥，谢谢。"},
        {"id": "d", "messages": [{"role": "user", "content": f"Tell me {boat}."}]},
    ]
    hits = []
    clean = evolve.drop_contaminated(rows, evolve.read_benchmarks(str(tmp_path)), hits)
    assert [row["id"] for row in clean] == ["b"]
    found = [(hit["id"], hit["file"]) for hit in hits]
    assert found == [("a", "sub/bench.json"), ("c", "zh.jsonl"), ("d", "sub/bench.json")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no"):
        evolve.read_benchmarks(str(tmp_path / "empty"))


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
    """Rows invented after the description of the formats in the README."""
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
    records = read_records(out / "rl.jsonl")
    assert read_records(out / "train.jsonl") == [record for record in records if "expert" in record]
    assert [r["task"] for r in records] == ["math", "instruction", "instruction", "instruction"]
    assert [r["messages"][0]["content"] for r in records][::3] == ["What is 3 + 4?", "Name a river."]
    assert records[0]["answer"] == "7" and records[2]["language"] == "zh"
    assert [c["question"] for c in records[2]["constraints"]] == ["语气温柔吗？", "是诗吗？"]
    assert [c["kwargs"] for c in records[1]["constraints"]] == [{"keywords": ["tea"]}, {}]
    assert score([records[1]], [records[1]["expert"]])[0].total == 3.0
    assert parse_response(records[3]["expert"]).format_ok
    counts = Counter()
    evolve.raif_records(str(tmp_path / "rl.jsonl"), counts)
    assert counts["dropped: unknown constraint odd:kind"] == 1
    rl[2]["target"] = "not JSON"
    with pytest.raises(InputError, match=":3: field 'target'"):
        evolve.raif_records(write(tmp_path / "bad.jsonl", rl), counts)


def test_dry_run_prints_the_steps_and_leaves_the_files_alone(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", FILES["teacher"][:9])
    evolve.main(["--recorded", path, "--dry-run", "3", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert printed.count("=" * 100) == 3
    for step in ("[0-constraints]", "[1-instruction]", "[2-expert]", "-filter-unsafe]"):
        assert printed.count(step) == 3
    assert not list((tmp_path / "out").rglob("train.jsonl"))
    assert len(read_jsonl(tmp_path / "out" / "dry-run" / "steps" / "0-constraints.jsonl")) == 3
