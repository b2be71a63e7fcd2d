"""How the model runs while it is measured: eagerly, compiled, or as replayed CUDA graphs.

Knows which options of `generate` make each, and where each can run. Does not know arms or
clocks. In every compiled mode `generate` compiles the decoding steps by itself over a static
cache, prompts run eagerly, and the guard's taps are installed.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from safe_decode.errors import ConfigurationError, UnsupportedError

__all__ = ["MODES", "Mode", "mode_options", "modes_of"]

Mode = Literal["eager", "compiled", "cuda-graph"]
"""eager: no graph. compiled: torch.compile in its default mode. cuda-graph: in the mode
reduce-overhead, which replays captured graphs and needs a CUDA device."""

MODES: tuple[Mode, ...] = get_args(Mode)


def modes_of(text: str, device: str) -> list[Mode]:
    """Read modes by comma.

    Raises:
        ConfigurationError: An unknown one, or none.
        UnsupportedError: "cuda-graph" on a device that has none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    modes: list[Mode] = [mode for name in names for mode in MODES if mode == name]
    unknown = [name for name in names if name not in MODES]
    if unknown or not modes:
        raise ConfigurationError(
            f"--mode {unknown[0] if unknown else text!r} is not one of {', '.join(MODES)}; pass "
            "one, or several by comma."
        )
    if "cuda-graph" in modes and not device.startswith("cuda"):
        raise UnsupportedError(
            f"--mode 'cuda-graph' is refused on device={device!r}: only CUDA devices replay "
            "captured graphs; pass --device cuda, or --mode compiled."
        )
    return list(dict.fromkeys(modes))


def mode_options(mode: Mode, backend: str) -> dict[str, Any]:
    """Return the options of `generate` that make a mode.

    Args:
        mode: Which.
        backend: Of torch.compile; "inductor" unless something is tried out.
    """
    if mode == "eager":
        return {}
    from transformers import CompileConfig

    name = "reduce-overhead" if mode == "cuda-graph" else "default"
    config: Any = CompileConfig(backend=backend)
    config.mode = name if backend == "inductor" else None  # other backends know no modes
    # transformers compiles on accelerators by itself, elsewhere where it is told to.
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}
