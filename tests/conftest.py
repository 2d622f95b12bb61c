"""A tiny Llama with its own tokenizer, and small records, for tests that need no download."""

import os

# Before torch is imported: spinning OpenMP threads make two processes on two cores up to 20 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import random
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("RAIF_SHARED", ROOT.parent / "shared"))
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def shared():
    """The folder of benchmark and conformance data, which is not part of the project."""
    if not SHARED.is_dir():
        pytest.skip(f"benchmark data not found at {SHARED} (set RAIF_SHARED to its folder)")
    return SHARED


def build_tokenizer(texts, vocab_size=512):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def build_model(vocab_size, *, hidden=64, layers=2, seed=0, tied=True):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=tied,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def double(model):
    """The model in float64 throughout. transformers' RMSNorm computes in float32 whatever the dtype: a difference of
    1e-16 before it can come out as 1e-8, which would hide what the float64 comparisons are after."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, norm=module: norm.weight * x * torch.rsqrt(
                x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon
            )
    return model.double()


COLOURS = ["red", "blue", "green", "white", "black", "brown", "grey", "pink"]


def make_records(count, *, seed=0, expert=True):
    """Toy instruction records: name a colour and a word, all in lower case or with a keyword."""
    rng = random.Random(seed)
    records = []
    for i in range(count):
        first, second = rng.sample(COLOURS, 2)
        kind, kwargs, text = rng.choice([
            ("change_case:english_lowercase", {}, "Use lower case only."),
            ("keywords:existence", {"keywords": [second]}, f"Use the word {second}."),
            ("punctuation:no_comma", {}, "Use no commas."),
        ])
        record = {
            "id": f"toy-{i:04d}", "source": "toy", "task": "instruction", "language": "en",
            "messages": [{"role": "user", "content": f"Name {first}. {text}"}],
            "constraints": [{"kind": "code", "id": kind, "kwargs": kwargs, "text": text, "depends_on": [],
                             "active": True}],
            "composition": "and",
        }
        if expert:
            record["expert"] = f"<think>\ni use {first} and {second}.\n</think>\n<answer>\n{first} {second}\n</answer>"
        records.append(record)
    return records


def math_records(count):
    return [
        {"id": f"sum-{i:04d}", "source": "toy", "task": "math", "language": "en",
         "messages": [{"role": "user", "content": f"{i} + 1? Put it in \\boxed{{}}."}], "answer": str(i + 1),
         "expert": f"<think>\none more.\n</think>\n<answer>\n\\boxed{{{i + 1}}}\n</answer>"}
        for i in range(count)
    ]


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a tiny random Llama with a tokenizer trained on the toy records."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    texts = [m["content"] for r in make_records(60) + math_records(20) for m in r["messages"]]
    texts += [r["expert"] for r in make_records(60) + math_records(20)]
    tokenizer = build_tokenizer(texts)
    build_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def last_step(run):
    """The step of the last checkpoint of a run."""
    return max(int(path.stem.removeprefix("step-")) for path in (run / "checkpoint").glob("step-*.pt"))


def run_stage(*args, cwd=ROOT, check=True, processes=1, **environment):
    """Run a stage as a user does (torchrun for several processes); returns the finished process."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    result = subprocess.run(
        [*command, *map(str, args)], cwd=cwd, text=True, capture_output=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **environment},
    )
    if check:
        assert result.returncode == 0, result.stderr[-3000:]
    return result


class JsonHandler(BaseHTTPRequestHandler):
    """A loopback server's handler; tests add do_POST."""

    def send(self, status, payload):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        pass


@contextmanager
def serving(handler):
    """The address of a running server, as an OpenAI client wants it."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1"
    httpd.shutdown()
