"""What a model's small files say, before its weights are loaded.

Knows configurations and tokenizers of the Hugging Face format. Does not know weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from safe_decode.errors import ConfigurationError, PromptError

__all__ = ["ModelFacts", "model_facts"]


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model; None where its configuration does not say.

    Attributes:
        width: Channels of the residual stream.
        layers: Decoder blocks.
        context: Positions.
    """

    width: int | None
    layers: int | None
    context: int | None


def model_facts(name: str) -> ModelFacts:
    """Read a model's configuration and tokenizer, and check what a build needs of them.

    Args:
        name: A directory, or a name that transformers resolves.

    Raises:
        ConfigurationError: There is no model under that name.
        PromptError: The tokenizer has no chat template.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        cause = str(error).strip().splitlines()[:1]
        raise ConfigurationError(
            f"model={name!r} cannot be read: {''.join(cause)} Pass a directory or name of a causal "
            "language model."
        ) from error
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            f"model={name!r} has no chat template, wanted one that opens the assistant's turn: a "
            "base model answers no requests. Pass a chat model, or save a template with "
            "tokenizer.chat_template = ... and tokenizer.save_pretrained(...)."
        )
    text = config.get_text_config()
    return ModelFacts(
        *(
            value if isinstance(value := getattr(text, key, None), int) else None
            for key in ("hidden_size", "num_hidden_layers", "max_position_embeddings")
        )
    )
