"""Load a language model: a small one that is fetched, a GGUF file, a folder or a hub's model."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hashattn.core.extras import require
from hashattn.core.files import default_cache_dir, replacing_folder, sha256, sweep
from hashattn.core.json_files import read_json, write_json
from hashattn.lab.workload.assets import GEMMA3, SMOLLM2, Asset, fetch
from hashattn.lab.workload.gemma import tokenizer_from_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

HASHES = "sha256.json"  # of the other files of a converted copy
NAMED = {"smollm2-135m": SMOLLM2, "gemma-3-270m": GEMMA3}


def load(
    model: str | Path | None = None, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Loaded:
    """Return (model, tokenizer), ready for inference.

    Args:
        model: a .gguf file, a folder as save_pretrained writes it, a hub id, or "gemma-3-270m", which is fetched (Gemma
            terms of use); None, or "smollm2-135m", is SmolLM2-135M-Instruct.
        dtype: of the weights.
        device: where they go.

    Raises:
        ValueError: no such model, or one that is damaged; what its reader said stands in brackets.
        DownloadError: what is fetched cannot be had.
    """
    for module in ("transformers", "accelerate", "gguf"):
        require(module, "hf", "loading a model")
    with _quiet():
        if asset := _asset(model):
            loaded = _fetched(asset, dtype)
        elif Path(str(model)).is_file():
            loaded = _from_gguf(Path(str(model)), dtype)
        else:
            loaded = _from_pretrained(str(model), dtype)
    network, tokenizer = loaded
    _repair_eos(network, tokenizer)
    return network.to(device).eval(), tokenizer  # type: ignore[arg-type]  # transformers' wrapper of to()


def check_source(model: str | Path | None) -> None:
    """Raise ValueError if load() could not take this, as far as that can be told without reading it.

    A name that is neither a file nor a folder passes if it looks like a hub's: only the hub knows.
    """
    if _asset(model):
        return
    path, asked = Path(str(model)), f"model={str(model)!r}"
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{asked} is a folder without config.json: give one as save_pretrained writes it")
    elif path.is_file():
        with path.open("rb") as file:
            if path.suffix != ".gguf" or file.read(4) != b"GGUF":
                raise ValueError(f"{asked} is a file but no GGUF: give a .gguf file, a folder or a hub id")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(model)):
        raise ValueError(f"{asked} is no file, no folder and no hub id such as HuggingFaceTB/SmolLM2-135M-Instruct")


def name_of(model: str | Path | None) -> str:
    """What to call the model that load() takes by this: without the folders that lead to it."""
    if asset := _asset(model):
        return asset.name
    path = Path(str(model))
    return path.resolve().name if path.exists() else str(model)


def sharing_weights(network: PreTrainedModel) -> PreTrainedModel:
    """A model of its own, so that something else can be attached to it, on the same weights."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, shared)


def cache_argument(network: PreTrainedModel) -> str:
    """What the model calls its cache: "cache" since transformers 5.24, "past_key_values" before."""
    return "cache" if "cache" in inspect.signature(network.forward).parameters else "past_key_values"


def _asset(model: str | Path | None) -> Asset | None:
    return SMOLLM2 if model is None else NAMED.get(str(model))


def _fetched(asset: Asset, dtype: torch.dtype) -> Loaded:
    """Reading a GGUF takes 20 to 90 s, so a converted copy (540 MB or 1.1 GB) is kept beside it.

    The copy is checked by its own list of hashes at each start, as the download is, and made again if it is not whole.
    """
    copy = default_cache_dir() / f"{Path(asset.filename).stem}.{asset.sha256[:8]}"
    if _whole(copy):
        with contextlib.suppress(ValueError):  # another version of transformers may not read it: it is made again
            return _from_pretrained(copy, dtype)
    network, tokenizer = _from_gguf(fetch(asset), torch.float32)
    with contextlib.suppress(OSError):  # no room for the copy: then each start converts again
        sweep(copy.parent, f".{copy.name[:40]}.*.new")
        _save(network, tokenizer, copy)
    return network.to(dtype), tokenizer  # type: ignore[arg-type]


def _save(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    with replacing_folder(folder) as scratch:
        network.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        write_json(scratch / HASHES, _hashes(scratch))


def _whole(folder: Path) -> bool:
    """Whether a folder holds the files of its list, no others, each with its hash."""
    try:
        return bool(read_json(folder / HASHES) == _hashes(folder))
    except (OSError, ValueError):
        return False


def _hashes(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != HASHES]
    return {str(path.relative_to(folder)): sha256(path) for path in files}


def _from_gguf(path: Path, dtype: torch.dtype) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if path.suffix != ".gguf":
        raise ValueError(f"model={str(path)!r} is a file but no .gguf: give a .gguf file, a folder or a hub id")
    with _readable(path):
        network = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
        if network.config.model_type.startswith("gemma"):
            tokenizer = tokenizer_from_gguf(path)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # The weights are plain tensors by now; what is left of the quantiser only keeps save_pretrained from working.
    network.hf_quantizer = None  # type: ignore[assignment]
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config
    return network, tokenizer


def _from_pretrained(model: str | Path, dtype: torch.dtype) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _readable(model):
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype), AutoTokenizer.from_pretrained(model)


@contextlib.contextmanager
def _readable(model: str | Path) -> Iterator[None]:
    """What a reader of models raises in this block, whatever it is, becomes a ValueError that names the model.

    Damaged files make safetensors, gguf and transformers raise almost anything.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"model={str(model)!r} cannot be loaded ({_first_line(error)}); give a .gguf file, a folder as "
            "save_pretrained writes it, or a hub id that this machine reaches; leave it out for the small model that "
            "comes with the demo"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _repair_eos(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Some GGUF files give the tokenizer another end of text than the model was trained with: the model is right."""
    eos = network.config.eos_token_id
    if isinstance(eos, int) and tokenizer.eos_token_id != eos:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and advice while loading, and put both back."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
