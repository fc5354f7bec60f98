"""LosslessGenerate: the generate() of an attached model whose drafts are checked, on the instance."""

from __future__ import annotations

import copy
import inspect
import weakref
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import StopStringCriteria

from hashattn.integrations.attached.drafts import DraftCounts
from hashattn.integrations.transformers.forward import Forward
from hashattn.integrations.transformers.graphs import Graphs
from hashattn.integrations.transformers.lossless.calls import Calls
from hashattn.integrations.transformers.lossless.decoding import Decoding
from hashattn.integrations.transformers.lossless.writer import Writer

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
ALONE = "this call cannot be checked: {}; greedy search and sampling are (attach without check for others)"


class LosslessGenerate:
    """Takes the place of a model's generate(): drafts by search, and writes what full attention would.

    Args:
        model: it is not kept alive.
        forward: what its hooks share.
        graphs: of its steps; None where none are wanted.
    """

    def __init__(self, model: nn.Module, forward: Forward, graphs: Graphs | None) -> None:
        self._model, self.forward, self.graphs = weakref.ref(model), forward, graphs
        self.counts = DraftCounts()
        kind: Any = type(model)
        self.__signature__ = inspect.signature(kind.generate.__get__(model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate.

        Raises:
            ValueError: what one model's next token alone does not decide, such as beams.
        """
        model: Any = self._model()
        assert model is not None
        given = self.__signature__.bind(*args, **kwargs).arguments
        given.update(given.pop("kwargs", {}))
        for name in ("custom_generate", "assistant_model"):
            if given.get(name) is not None:
                raise ValueError(ALONE.format(f"{name} is given"))
        if _asked(model, given, "cache_implementation") == "paged":
            raise ValueError(ALONE.format("a paged cache is filled by continuous batching"))
        if _asked(model, given, "token_healing"):
            raise ValueError(ALONE.format("token_healing=True writes beforehand"))
        streamer = given.get("streamer")
        _stop_by_strings(model, given)

        def write(
            model: Any,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: GenerationConfig,
            **model_kwargs: Any,
        ) -> Any:
            refuse(generation_config)
            writer = Writer(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
            calls = Calls(model, self.forward.passes, self.graphs, model_kwargs)
            return Decoding(writer, calls, self.counts, self.forward.options.drafted).run()

        return type(model).generate(model, **given, custom_generate=write)

    def reset(self) -> None:
        """Count anew."""
        self.counts = DraftCounts()

    def __reduce__(self) -> tuple[type[LosslessGenerate], tuple[Any, ...]]:
        return LosslessGenerate, (self._model(), self.forward, self.graphs)


def check_generates(model: nn.Module) -> None:
    """Raise ValueError unless a model's own generate() can be stood in for."""
    kind = type(model).__name__
    generates: Any = model
    if not isinstance(model, GenerationMixin) or not generates.can_generate():
        raise ValueError(f"check is for models with generate(), which a {kind} has not: attach to the whole model")
    if "generate" in vars(model):
        raise ValueError(f"check would hide the generate() that this {kind} was given: attach without check")


def refuse(config: GenerationConfig) -> None:
    """Raise ValueError for what drafts cannot be checked for."""
    mode = config.get_generation_mode()
    reasons = {
        f"it asks for {mode.value.replace('_', ' ')}": mode not in MODES,
        "guidance_scale runs the model a second time in a processor": config.guidance_scale not in (None, 1),
        "SynthID watermarks keep a state from token to token": "SynthID" in type(config.watermarking_config).__name__,
        "output_attentions=True asks for weights that no one has": bool(config.output_attentions),
        "use_cache=False leaves nothing to search": config.use_cache is False,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(ALONE.format(", and ".join(found)))


def _asked(model: Any, given: dict[str, Any], name: str) -> Any:
    """A setting of generation, as generate() will find it."""
    configs = (given.get("generation_config"), model.generation_config)
    return given[name] if name in given else next((x for c in configs if (x := getattr(c, name, None))), None)


def _stop_by_strings(model: Any, given: dict[str, Any]) -> None:
    """Make a criterion of stop strings, since generate() keeps the tokenizer from who decodes in its place."""
    strings, tokenizer = _asked(model, given, "stop_strings"), given.get("tokenizer")
    if strings is None or tokenizer is None:
        return  # which generate() refuses
    criterion = StopStringCriteria(tokenizer, strings)
    given["stopping_criteria"] = StoppingCriteriaList([*(given.get("stopping_criteria") or ()), criterion])
    config = given.get("generation_config")
    if config is not None:
        given["generation_config"] = config = copy.copy(config)
        config.stop_strings = None
    if given.get("stop_strings") is not None or model.generation_config.stop_strings is not None:
        given["stop_strings"] = None
