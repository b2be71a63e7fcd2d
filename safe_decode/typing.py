"""What the project needs of the objects that users bring: model, tokenizer, cache and settings.

States the members that the code uses, and no more. The classes of transformers fit without being
imported here, and so does any other class with these members. Nothing is checked at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = [
    "Cache",
    "CausalLM",
    "GenerationSettings",
    "Json",
    "ModelConfig",
    "ForwardOutput",
    "Tokenizer",
]

Json: TypeAlias = "None | bool | int | float | str | list[Json] | dict[str, Json]"
"""Any value that `json.loads` yields."""


class Cache(Protocol):
    """Keys and values of the tokens that a model has read, as `past_key_values` holds them."""

    def get_seq_length(self) -> int:
        """Return how many positions each row holds."""

    def get_max_length(self) -> int:
        """Return for how many positions there are places; -1 where there is no limit."""

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` positions; a negative number says how many to remove."""

    def activate_past_recording(self) -> None:
        """Keep what `crop` needs of windows that move on."""

    def reset(self) -> None:
        """Forget all positions."""

    @property
    def is_croppable(self) -> bool:
        """Say whether `crop` takes the cache back to what it held before."""


class ForwardOutput(Protocol):
    """What a forward pass returns with `return_dict=True`."""

    @property
    def logits(self) -> Tensor:
        """Scores of the next token, [batch, seq, vocab]."""

    @property
    def past_key_values(self) -> Cache:
        """The cache after the pass, where one is used."""


class ModelConfig(Protocol):
    """The architecture of a model; further attributes depend on the family."""

    @property
    def model_type(self) -> str:
        """Name of the family."""

    @property
    def vocab_size(self) -> int:
        """Token ids that the model scores."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream, d_model."""

    @property
    def num_hidden_layers(self) -> int:
        """Decoder blocks."""

    def get_text_config(self) -> ModelConfig:
        """Return the config of the text decoder, which is the config itself in text models."""


class GenerationSettings(Protocol):
    """Options of `generate`; further ones are read by name, as versions of transformers differ."""

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """Ids that end a row."""


class CausalLM(Protocol):
    """A decoder-only causal language model with `generate`, such as `LlamaForCausalLM`."""

    training: bool
    """Whether dropout is active."""

    @property
    def config(self) -> ModelConfig:
        """The architecture."""

    @property
    def generation_config(self) -> GenerationSettings:
        """Default options of `generate`."""

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""

    @property
    def dtype(self) -> torch.dtype:
        """In what the model computes."""

    @property
    def forward(self) -> Callable[..., Any]:
        """The forward pass without hooks; its signature says which options it takes."""

    @property
    def generate(self) -> Callable[..., Any]:
        """Continue a batch of prompts; takes the options of transformers' `generate`."""

    @property
    def prepare_inputs_for_generation(self) -> Callable[..., dict[str, Any]]:
        """Return the arguments of the next forward pass from the ids and the cache."""

    @property
    def to(self) -> Callable[..., Self]:
        """Move the model to a device or dtype."""

    def __call__(self, *args: object, **kwargs: object) -> ForwardOutput:
        """Run one forward pass."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield every weight once."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield every weight once, with its path."""

    def modules(self) -> Iterator[nn.Module]:
        """Yield the model and every module inside it."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the model and every module inside it, with their paths."""

    def get_submodule(self, target: str) -> nn.Module:
        """Return the module at a path."""

    @property
    def get_input_embeddings(self) -> Callable[[], Any]:
        """Return the module that maps token ids to vectors; its weight is [vocab, d_model]."""

    def eval(self) -> Self:
        """Switch dropout off."""

    def train(self, mode: bool = True) -> Self:
        """Switch dropout on or off."""

    def save_pretrained(self, save_directory: str | PathLike[str]) -> object:
        """Write weights and config to a directory."""


class Tokenizer(Protocol):
    """A tokenizer of transformers, or one with these members."""

    @property
    def bos_token_id(self) -> int | None:
        """Id that begins a text."""

    @property
    def eos_token_id(self) -> int | None:
        """Id that ends a text."""

    @property
    def eos_token(self) -> str | None:
        """Spelling of the id that ends a text."""

    @property
    def pad_token_id(self) -> int | None:
        """Id that fills short rows."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, object]:
        """Tokens beside the trained vocabulary, by id."""

    @property
    def all_special_ids(self) -> Sequence[int]:
        """Ids of the special tokens."""

    @property
    def apply_chat_template(self) -> Callable[..., Any]:
        """Render messages to ids or text; takes the options of transformers."""

    def __len__(self) -> int:
        """Return the size of the vocabulary, the added tokens included."""

    def __call__(self, text: list[str], *, add_special_tokens: bool = True) -> Mapping[str, Any]:
        """Encode several texts; "input_ids" holds a list of ids for each."""

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        split_special_tokens: bool = False,
        return_attention_mask: bool = False,
    ) -> list[int]:
        """Return the ids of a text."""

    def decode(
        self,
        token_ids: int | list[int] | Tensor,
        skip_special_tokens: bool = False,
        *,
        clean_up_tokenization_spaces: bool = False,
    ) -> Any:  # noqa: ANN401 - str, but transformers states `str | list[str]` for its batches
        """Return the text of a row of ids."""

    def convert_ids_to_tokens(self, ids: int) -> object:
        """Return the spelling of a token."""

    def get_vocab(self) -> dict[str, int]:
        """Return the id of every token, the added ones included."""

    def get_added_vocab(self) -> dict[str, int]:
        """Return the id of every added token."""

    def save_pretrained(self, save_directory: str | PathLike[str]) -> object:
        """Write the tokenizer to a directory."""
