"""Loading models, the embedded artefacts and what goes with them.

Knows where the artefacts lie in the package and how a name or path becomes a model on a
device. Does not know generation, bundles' insides or how anything is shown. Imports
transformers only when a model is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from safe_decode.demo.prompts import DemoPrompt, Scene, read_prompts, showcases
from safe_decode.errors import ConfigurationError

if TYPE_CHECKING:
    from safe_decode.bundle.bundle import ProbeBundle

__all__ = ["Dtype", "Embedded", "Loaded", "artefact", "embedded", "load_model"]

ArtefactName = Literal["aligned", "unaligned", "bundle", "prompts.jsonl"]
"""aligned: the model that refuses on the surface. unaligned: the one before alignment.
bundle: the probe bundle made for `aligned`. prompts.jsonl: held-out prompts."""

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in eval mode with its tokenizer, as transformers yields them."""

    model: Any
    tokenizer: Any


@dataclass(frozen=True, slots=True)
class Embedded:
    """The embedded aligned model with all that belongs to it."""

    model: Any
    tokenizer: Any
    bundle: ProbeBundle
    prompts: tuple[DemoPrompt, ...]

    def showcase(self, scene: Scene) -> DemoPrompt:
        """Return the prompt that shows a scene.

        Raises:
            ConfigurationError: No prompt of that scene is marked as a showcase.
        """
        for prompt in showcases(self.prompts):
            if prompt.scene == scene:
                return prompt
        raise ConfigurationError(
            f"scene={scene!r} has no showcase; pass one of "
            f"{[prompt.scene for prompt in showcases(self.prompts)]}."
        )


def embedded(*, device: str = "cpu", dtype: Dtype = "float32") -> Embedded:
    """Load the embedded aligned model, its bundle and the held-out prompts, offline.

    Raises:
        ConfigurationError: The installation lacks an artefact.
    """
    from safe_decode.bundle.bundle import ProbeBundle

    loaded = load_model(artefact("aligned"), device=device, dtype=dtype)
    bundle = ProbeBundle.load(artefact("bundle"))
    prompts = read_prompts(artefact("prompts.jsonl"))
    return Embedded(loaded.model, loaded.tokenizer, bundle, prompts)


def artefact(name: ArtefactName) -> Path:
    """Return the path of an embedded artefact.

    Raises:
        ConfigurationError: The installation lacks it; the message says how to make it.
    """
    path = Path(str(resources.files("safe_decode.demo"))) / "artefacts" / name
    if not path.exists():
        raise ConfigurationError(
            f"the embedded artefact {name!r} is missing from this installation; make it with "
            "`python -m probes.organism`, or pass --model and --bundle of your own."
        )
    return path


def load_model(name: str | Path, *, device: str = "cpu", dtype: Dtype = "float32") -> Loaded:
    """Load a causal language model and its tokenizer by name or path.

    Args:
        name: A directory in the Hugging Face format, or a name that transformers resolves.
        device: Where the model goes, as torch spells it.
        dtype: In what it computes.

    Raises:
        ConfigurationError: Unknown dtype or device, or nothing to load under that name.
    """
    if dtype not in get_args(Dtype):
        raise ConfigurationError(f"dtype={dtype!r} is not one of {get_args(Dtype)}; pass one.")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _as_configuration_error(name, device):
        target = torch.device(device)
        tokenizer = AutoTokenizer.from_pretrained(str(name))
        model: Any = AutoModelForCausalLM.from_pretrained(str(name), dtype=getattr(torch, dtype))
        return Loaded(model.to(target).eval(), tokenizer)


@contextlib.contextmanager
def _as_configuration_error(name: str | Path, device: str) -> Iterator[None]:
    """Turn what transformers and torch raise on bad names into one clear error."""
    try:
        yield
    # AssertionError: what torch raises for "cuda" in a build without CUDA.
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        cause = str(error).strip().splitlines()[:1]
        raise ConfigurationError(
            f"model={str(name)!r} cannot be loaded on device={device!r}: {''.join(cause)} Pass "
            "a directory or name of a causal language model, and a device that is there."
        ) from error
