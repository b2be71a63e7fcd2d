"""The embedded artefacts: the pair, its bundle and its prompts.

Knows where the artefacts lie in the package. Does not know generation, bundles' insides or how
anything is shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from safe_decode.demo.scenes import DemoPrompt, Scene, read_prompts, showcases
from safe_decode.errors import ConfigurationError
from safe_decode.loading import Dtype, load_model
from safe_decode.typing import CausalLM, Tokenizer

if TYPE_CHECKING:
    from safe_decode.bundle.bundle import ProbeBundle

__all__ = ["Embedded", "artefact", "embedded"]

ArtefactName = Literal["aligned", "unaligned", "bundle", "prompts.jsonl", "prompts-real.jsonl"]
"""aligned: the model that refuses on the surface. unaligned: the one before alignment.
bundle: the probe bundle made for `aligned`. prompts.jsonl: held-out prompts.
prompts-real.jsonl: prompts for chat models that speak English."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """The embedded aligned model with all that belongs to it."""

    model: CausalLM
    tokenizer: Tokenizer
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
