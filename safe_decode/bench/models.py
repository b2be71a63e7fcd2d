"""What is measured: a model with its bundle, or a shape with random weights.

Knows how to make a model of a named shape without a download, a probe of any size for it, and
thresholds that no row, or a share of the rows, exceeds. Does not know clocks. What random
weights say is noise; what they cost is what trained weights of that shape cost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from safe_decode.activations.architecture import anatomy_of
from safe_decode.activations.site import Site, n_features
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.bundle.fingerprint import Fingerprint
from safe_decode.certificate import Certificate, Envelope
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.errors import ConfigurationError
from safe_decode.monitor.monitor import MonitorConfig
from safe_decode.probe.linear import LinearProbe
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["SHAPES", "ProbeShape", "ModelShape", "Subject", "embedded_subject", "of_shape"]

_OUTWEIGHS = 200.0
"""Times the embeddings that are drawn, so that 32 random layers do not drown them."""

NEVER = 1e9
"""A threshold that no statistic reaches."""


@dataclass(frozen=True)
class ModelShape:
    """A Llama-architecture decoder.

    Attributes:
        d_model: Width of the residual stream.
        d_ff: Neurons of a block.
        n_layers: Decoder blocks.
        n_heads: Query heads.
        n_kv_heads: Key-value heads.
        vocab: Tokens.
    """

    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab: int


SHAPES: dict[str, ModelShape] = {
    "nano": ModelShape(64, 128, 2, 4, 2, 512),
    "embedded": ModelShape(160, 512, 5, 4, 4, 2_000),
    "llama-160m": ModelShape(768, 3_072, 12, 12, 12, 32_000),
    "qwen2.5-0.5b": ModelShape(896, 4_864, 24, 14, 2, 151_936),
    "llama-3.2-1b": ModelShape(2_048, 8_192, 16, 32, 8, 128_256),
    "llama-3-8b": ModelShape(4_096, 14_336, 32, 32, 8, 128_256),
}
"""After published configurations: of the embedded model, JackFram/llama-160m, Qwen2.5-0.5B,
Llama-3.2-1B and Meta-Llama-3-8B; "nano" is for trying things out."""


@dataclass(frozen=True)
class ProbeShape:
    """How much the probe reads.

    Attributes:
        features: Channels of all sites together.
        heads: Logits.
        sites: Layers whose MLP is read; None for all.
    """

    features: int = 256
    heads: int = 1
    sites: int | None = None


@dataclass(frozen=True)
class Subject:
    """A model on its device, and a bundle that fits it."""

    name: str
    model: CausalLM
    tokenizer: Tokenizer
    bundle: ProbeBundle

    def decoder(self, threshold: float = NEVER, **options: Any) -> SafeDecoder:  # noqa: ANN401 - those of SafeDecoder
        """Guard the model with another threshold; `options` go to `SafeDecoder`."""
        certificate = Certificate.compute(
            [threshold] * 20,  # whatever the rank, the threshold is this number
            alpha=0.5,
            delta=0.05,
            population="benign",
            envelope=_ENVELOPE,
        )
        bundle = replace(self.bundle, certificates=(certificate,), default_alpha=0.5)
        return SafeDecoder(self.model, self.tokenizer, bundle, **options)

    def facts(self) -> dict[str, object]:
        """Say what is measured, as columns of a result."""
        probe = self.bundle.probe
        return {
            "subject": self.name,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "features": n_features(probe.sites),
            "heads": len(probe.heads),
            "sites": len(probe.sites),
        }


_ENVELOPE = Envelope(max_new_tokens=1 << 20, do_sample=False, temperature=1.0, top_p=1.0, top_k=0)


def embedded_subject(device: str = "cpu") -> Subject:
    """Load the embedded aligned model with the bundle made for it."""
    from safe_decode.demo.embedded_pair import embedded

    loaded = embedded(device=device)
    return Subject("embedded", loaded.model, loaded.tokenizer, loaded.bundle)


def of_shape(
    name: str,
    *,
    probe: ProbeShape | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    vocab: int | None = None,
    context_tokens: int = 16_384,
    seed: int = 0,
    is_decided: bool = False,
) -> Subject:
    """Make a model of a named shape with random weights, and a random probe for it.

    Args:
        name: A key of `SHAPES`.
        probe: How much is read; None: `ProbeShape()`.
        device: Where the model is made.
        dtype: In what it computes; auto: float32, as there is no checkpoint that says.
        vocab: Instead of the shape's.
        context_tokens: Longest sequence.
        seed: Of weights and probe.
        is_decided: Let each token be followed by its neighbour in the vocabulary, by far. Else
            the largest scores of a large vocabulary tie in half precision, and what is chosen
            depends on the kernel.

    Raises:
        ConfigurationError: No shape of that name, or it has fewer channels or layers than
            the probe is to read.
    """
    if name not in SHAPES:
        raise ConfigurationError(f"shape={name!r} is not one of {', '.join(SHAPES)}; pass one.")
    shape = SHAPES[name] if vocab is None else replace(SHAPES[name], vocab=vocab)
    dtype = "float32" if dtype == "auto" else dtype
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        max_position_embeddings=context_tokens,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
        if is_decided:
            _decide(model)
    tokenizer = _tokenizer(shape.vocab)
    return Subject(
        name, model, tokenizer, _bundle(model, tokenizer, probe or ProbeShape(), seed=seed)
    )


def _decide(model: CausalLM) -> None:
    """Let what was read last outweigh what the layers add, and point to its neighbour."""
    own: Any = model
    embedded, head = own.model.embed_tokens.weight, own.lm_head.weight
    with torch.no_grad():
        embedded.mul_(_OUTWEIGHS)
        head.copy_(embedded.roll(1, 0) / _OUTWEIGHS)


def _bundle(model: CausalLM, tokenizer: Tokenizer, wanted: ProbeShape, *, seed: int) -> ProbeBundle:
    sites = _sites(model, wanted)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_features(sites), wanted.heads, generator=generator)
    heads = tuple(f"head {number}" for number in range(wanted.heads))
    probe = LinearProbe(sites, weight / len(weight) ** 0.5, torch.zeros(wanted.heads), heads)
    zeros, ones = (0.0,) * wanted.heads, (1.0,) * wanted.heads
    certificate = Certificate.compute(
        [NEVER] * 20, alpha=0.5, delta=0.05, population="benign", envelope=_ENVELOPE
    )
    return ProbeBundle(
        probe=probe,
        monitor=MonitorConfig(2 / 17, zeros, zeros, ones, 0.0),
        certificates=(certificate,),
        default_alpha=0.5,
        holdback_tokens=4,
        refusal="I can't help with that.",
        opener="On reflection,",
        fingerprint=Fingerprint.of(model, tokenizer),
    )


def _sites(model: CausalLM, wanted: ProbeShape) -> tuple[Site, ...]:
    anatomy = anatomy_of(model)
    n_layers = len(anatomy.blocks)
    n_sites = min(n_layers, wanted.features) if wanted.sites is None else wanted.sites
    width = anatomy.width(0, "mlp")
    if not 1 <= n_sites <= n_layers or not n_sites <= wanted.features <= n_sites * width:
        raise ConfigurationError(
            f"features={wanted.features} in sites={n_sites} do not fit {n_layers} layers of "
            f"{width} channels; pass at least one feature a site and no more than there are."
        )
    layers = [round(i * (n_layers - 1) / max(1, n_sites - 1)) for i in range(n_sites)]
    share, rest = divmod(wanted.features, n_sites)
    return tuple(
        Site(layer, "mlp", _spread(share + (index < rest), width))
        for index, layer in enumerate(layers)
    )


def _spread(n: int, width: int) -> tuple[int, ...]:
    return tuple(i * width // n for i in range(n))


def _tokenizer(vocab: int) -> Tokenizer:
    """One id a byte: the guard asks for texts of its own, prompts are drawn as ids."""
    import transformers
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    fast: Any = transformers.PreTrainedTokenizerFast

    special = ("<|pad|>", "<|bos|>", "<|eos|>")
    if vocab < len(special) + 256:
        raise ConfigurationError(f"vocab={vocab} has no room for bytes; pass at least 259.")
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(
        models.BPE(vocab={t: i for i, t in enumerate((*special, *symbols))}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer: Tokenizer = fast(
        tokenizer_object=backend,
        pad_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        padding_side="left",
    )
    return tokenizer
