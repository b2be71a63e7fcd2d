"""Configurations of an engine that are refused by name, since the guard was not tested in them.

Most of them would skip the guard, or bring keys and values that no score belongs to. Knows
vLLM's configuration. Changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from safe_decode.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["REFUSED", "RefusedOption", "require_supported"]


@dataclass(frozen=True)
class RefusedOption:
    """One option that is refused.

    Attributes:
        path: Of the value in vLLM's configuration.
        why: What would go wrong.
        remedy: What to do instead.
        allowed: Values that are not refused.
    """

    path: str
    why: str
    remedy: str
    allowed: tuple[object, ...] = (None, False)

    @property
    def name(self) -> str:
        """The option as operators know it."""
        return self.path.rpartition(".")[2]

    def refused_value(self, config: VllmConfig) -> object:
        """Return what is set, if it is refused; None: it is not, or vLLM has no such option."""
        value: object = config
        for name in self.path.split("."):
            value = getattr(value, name, None)
        return None if any(value is one or value == one for one in self.allowed) else value


_SINGLE = (None, 0, 1)
_PARTS = "each rank holds a part of what the probe reads"
_ELSEWHERE = "keys and values would come from elsewhere, without the scores that belong to them"

REFUSED = (
    RefusedOption(
        "speculative_config",
        "several tokens are accepted a step, and a forced one may be overruled by a draft",
        "leave --speculative-config out",
    ),
    RefusedOption(
        "parallel_config.pipeline_parallel_size", _PARTS, "set --pipeline-parallel-size 1", _SINGLE
    ),
    RefusedOption(
        "parallel_config.tensor_parallel_size", _PARTS, "set --tensor-parallel-size 1", _SINGLE
    ),
    RefusedOption(
        "parallel_config.data_parallel_size",
        "ranks were not tested side by side",
        "run one engine a replica, with --data-parallel-size 1",
        _SINGLE,
    ),
    RefusedOption(
        "parallel_config.prefill_context_parallel_size",
        "a prompt's positions are spread over ranks",
        "set it to 1",
        _SINGLE,
    ),
    RefusedOption(
        "parallel_config.decode_context_parallel_size",
        "a row's cache is spread over ranks",
        "set it to 1",
        _SINGLE,
    ),
    RefusedOption(
        "parallel_config.enable_dbo",
        "a step is split in two forwards",
        "leave --enable-dbo out",
    ),
    RefusedOption(
        "parallel_config.enable_batch_sharded_sampling",
        "rows are sampled where their scores are not",
        "leave --enable-batch-sharded-sampling out",
    ),
    RefusedOption(
        "lora_config", "adapters change the activations of a row", "leave --enable-lora out"
    ),
    RefusedOption("kv_transfer_config", _ELSEWHERE, "leave --kv-transfer-config out"),
    RefusedOption("ec_transfer_config", _ELSEWHERE, "leave --ec-transfer-config out"),
    RefusedOption(
        "cache_config.kv_offloading_size", _ELSEWHERE, "leave --kv-offloading-size out", _SINGLE
    ),
    RefusedOption(
        "cache_config.kv_sharing_fast_prefill",
        "layers skip prompt positions that are to be read",
        "leave --kv-sharing-fast-prefill out",
    ),
    RefusedOption(
        "cache_config.cache_dtype",
        "a rounded cache moves the scores away from what was certified",
        "set --kv-cache-dtype auto",
        (None, "auto"),
    ),
    RefusedOption(
        "scheduler_config.scheduler_cls",
        "the guard has a scheduler of its own, which ends its rows",
        "leave --scheduler-cls out",
    ),
    RefusedOption(
        "watermark_config",
        "the sampler is replaced by one that may not choose a forced token",
        "leave the watermark out",
    ),
    RefusedOption(
        "diffusion_config", "tokens are not written in order", "serve an autoregressive model"
    ),
    RefusedOption(
        "weight_transfer_config",
        "weights would change after they were compared with the bundle",
        "leave it out and start a new engine for new weights",
    ),
    RefusedOption(
        "model_config.enable_sleep_mode",
        "scores would be lost where the cache is dropped",
        "leave --enable-sleep-mode out",
    ),
    RefusedOption(
        "model_config.enable_trace_replay",
        "a trace overwrites tokens after they were forced",
        "leave --enable-trace-replay out",
    ),
    RefusedOption(
        "model_config.enable_prompt_embeds",
        "a prompt of embeddings has no ids to find the answer's beginning in",
        "leave --enable-prompt-embeds out",
    ),
    RefusedOption(
        "model_config.hf_overrides",
        "the model would compute otherwise than its configuration says",
        "leave --hf-overrides out",
        (None, {}),
    ),
    RefusedOption(
        "model_config.quantization",
        "no fingerprint is taken of weights that the engine quantises",
        "serve the model in the numbers of its bundle",
    ),
    RefusedOption(
        "model_config.skip_tokenizer_init",
        "the guard's words have to be encoded",
        "leave --skip-tokenizer-init out",
    ),
    RefusedOption(
        "model_config.multimodal_config", "only text is guarded", "serve a model of text alone"
    ),
    RefusedOption(
        "model_config.runner_type",
        "nothing is generated, so nothing is guarded",
        "unset SAFE_DECODE_BUNDLE for an engine that embeds or classifies",
        (None, "generate"),
    ),
)
"""What is refused, in the order in which it is looked at."""


def require_supported(config: VllmConfig, *, is_cpu: bool) -> None:
    """Check an engine's configuration before weights are read.

    Args:
        config: Of the engine.
        is_cpu: Whether it runs on a CPU.

    Raises:
        UnsupportedError: An option of `REFUSED`, or vLLM's first model runner on an accelerator.
    """
    for option in REFUSED:
        value = option.refused_value(config)
        if value is not None:
            shown = value if isinstance(value, (str, int, float)) else type(value).__name__
            raise UnsupportedError(
                f"{option.name}={shown} is refused under the guard: {option.why}; {option.remedy}."
            )
    if not is_cpu and not config.use_v2_model_runner:
        raise UnsupportedError(
            "the V1 model runner is refused on an accelerator: its graphs would skip the guard's "
            "bookkeeping; set VLLM_USE_V2_MODEL_RUNNER=1."
        )
