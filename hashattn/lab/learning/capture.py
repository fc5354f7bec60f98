"""capture(): post-RoPE queries and keys of real prefill and decoding, written to files layer by layer."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hashattn.core import tensor_files
from hashattn.core.errors import UserError, refusals
from hashattn.core.files import locked
from hashattn.core.progress import bar
from hashattn.lab.learning.manifest import LOCK, Manifest, Recording, check_free, claim
from hashattn.lab.learning.plan import Plan, Prompt
from hashattn.lab.learning.shards import TOKENS, Shards, layer_filename, save
from hashattn.lab.workload.prefill import positions_of
from hashattn.lab.workload.texts import Text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def capture(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    out: str | Path,
    plan: Plan | None = None,
    *,
    name: str | None = None,
    progress: bool = False,
) -> Shards:
    """Run a model densely over texts and retrieval prompts and keep what its attention layers search with and through.

    A layer is written as soon as it has run, so that memory holds the model, its activations over one sequence and one
    layer's queries and keys; while tokens are decoded, also the model's own cache. What is whole already is not done
    again, so the same call resumes after a kill, and ends with the same bytes on the same machine.

    Args:
        model: a causal language model that can be attached.
        tokenizer: the model's.
        texts: to take sequences from, in turn.
        out: a folder, new, empty, or from the same call before.
        plan: which sequences, layers and queries.
        name: of the model, for people; the model's own by default.
        progress: show a progress bar on a terminal (needs tqdm).

    Returns:
        The folder, opened.

    Raises:
        ValueError: a text that is too short, a length beyond the model's context, a model or layer that cannot be
            captured, another folder's contents, another process that captures into it; before anything is run.
            Values that the dtype cannot hold.
    """
    from hashattn.integrations.transformers import facts_of
    from hashattn.integrations.transformers.capture import capturable

    plan = plan or Plan()
    with refusals(ValueError):
        layers = capturable(model, plan.layers)
        prompts = plan.prompts(tokenizer, texts)
        _check_context(model, plan, prompts)
        manifest = Manifest(
            facts_of(model, name), tuple(layers), plan.dtype, tuple(p.recording for p in prompts), plan.arguments(texts)
        )
        check_free(out)
    Path(out).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        with refusals(ValueError):
            held.enter_context(locked(Path(out, LOCK), f"capturing into {str(out)!r}"))
            claim(manifest, out)
        shards = Shards(Path(out), manifest)
        shown = held.enter_context(bar("hf", "capturing", prompts, unit="sequence", shown=progress))
        for prompt in shown:
            shown.set_description(prompt.recording.name)
            if shards.fault(prompt.recording):
                _record(model, prompt, plan, shards)
        return Shards.open(out)


class Recorder:
    """Writes what the layers of a model are given: the prefill of each at once, decoded tokens at the end.

    Args:
        folder: of the sequence.
        recording: what is said about it.
        positions: int64 [T], ascending: the columns whose queries are kept.
        dtype: of the files.
    """

    def __init__(self, folder: Path, recording: Recording, positions: Tensor, dtype: torch.dtype) -> None:
        self.folder, self.recording, self.dtype = folder, recording, dtype
        self.positions = positions
        self.decoded: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: q [Hq, M, D], k [Hkv, M, D] of M decoded tokens
        self.steps: dict[int, int] = {}  # by layer: how many of these there are

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """A sink for tapped(): q [1, Hq, T, D] of the tokens of this call, k [1, Hkv, N, D] of all so far."""
        if layer in self.decoded:
            step = self.steps[layer]
            self.decoded[layer][0][:, step] = self._held(layer, "queries", q[0, :, 0])
            self.decoded[layer][1][:, step] = self._held(layer, "keys", k[0, :, -1])
            self.steps[layer] += 1
            return
        kept = self.positions[self.positions < self.recording.tokens].to(q.device)
        self._save(layer, self._held(layer, "queries", q[0, :, kept]), self._held(layer, "keys", k[0]))
        self.decoded[layer], self.steps[layer] = (self._room(q), self._room(k)), 0

    def finish(self) -> None:
        """Join the decoded tokens to what was written."""
        for layer, decoded in self.decoded.items():
            if self.steps[layer]:
                first = tensor_files.read(self._path(layer))
                q, k = (torch.cat([first[name], more], dim=1) for name, more in zip("qk", decoded, strict=True))
                self._save(layer, q, k)

    def _save(self, layer: int, q: Tensor, k: Tensor) -> None:
        positions, said = self.positions[: q.shape[1]].int(), self.recording
        save(
            self._path(layer),
            {"q": q, "k": k, "positions": positions},
            layer=layer,
            name=said.name,
            kind=said.kind,
            prefill=said.tokens,
        )

    def _room(self, like: Tensor) -> Tensor:
        """For decoded tokens: small tensors kept at each step would pin the memory that a growing cache leaves."""
        return torch.empty(like.shape[1], self.recording.decoded, like.shape[3], dtype=self.dtype)

    def _path(self, layer: int) -> Path:
        return self.folder / layer_filename(layer)

    def _held(self, layer: int, what: str, values: Tensor) -> Tensor:
        """The same on the CPU in the dtype of the files."""
        held = values.to(self.dtype)
        if not held.isfinite().all():
            raise UserError(
                f"layer {layer} has {what} up to {float(values.abs().max()):.3g} in {self.recording.name}, which "
                f"{str(self.dtype).removeprefix('torch.')} cannot hold"
                + ("" if self.dtype == torch.bfloat16 else ": use bfloat16")
            )
        return held.cpu()


def _record(model: PreTrainedModel, prompt: Prompt, plan: Plan, shards: Shards) -> None:
    """Capture one sequence; its tokens, written last, say that it is whole."""
    from hashattn.integrations.transformers.capture import tapped

    folder = shards.folder / prompt.recording.name
    shutil.rmtree(folder, ignore_errors=True)  # what a kill left
    folder.mkdir()
    recorder = Recorder(folder, prompt.recording, prompt.positions(plan.queries), getattr(torch, plan.dtype))
    with torch.no_grad(), tapped(model, recorder, shards.layers):
        ids = prompt.ids.to(model.device)
        if plan.decode:
            ids = _continue(model, ids, plan.decode, plan.temperature, prompt.recording.seed)
        else:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    recorder.finish()
    save(folder / TOKENS, {"ids": ids[0].int().cpu()})


def _continue(model: PreTrainedModel, ids: Tensor, tokens: int, temperature: float, seed: int) -> Tensor:
    """ids [1, N + tokens]: with a continuation by the model that it has read itself; it never ends the text."""
    from transformers import GenerationConfig

    eos = model.config.get_text_config(decoder=True).eos_token_id
    drawn = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    new = tokens + 1  # the last one is written, but not read any more
    config = GenerationConfig(
        max_new_tokens=new, min_new_tokens=new, eos_token_id=eos, pad_token_id=0, do_sample=bool(temperature), **drawn
    )
    on_gpu = [ids.device] if ids.device.type == "cuda" else []
    with torch.random.fork_rng(devices=on_gpu):
        torch.manual_seed(seed)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)  # type: ignore[operator]
    return out[:, :-1]


def _check_context(model: PreTrainedModel, plan: Plan, prompts: Sequence[Prompt]) -> None:
    limit = positions_of(model)
    longest = max(p.recording.keys for p in prompts)
    if limit is not None and longest > limit:
        raise ValueError(
            f"tokens={plan.tokens} makes sequences of up to {longest} tokens (with answers and {plan.decode} decoded), "
            f"but the model has {limit} positions: use at most {plan.tokens - longest + limit}"
        )
