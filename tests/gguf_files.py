"""GGUF files of tiny models, written here, so that tests need no package for it.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from safe_decode.testing.models import VOCAB_SIZE, byte_tokenizer

LAYERS, WIDTH, NEURONS, HEADS, CONTEXT = 3, 32, 64, 2, 256
_F32, _Q8_0 = 0, 8
_ALIGNMENT = 32
_Value = str | int | float | list[int] | list[str]
_Tensors = dict[str, tuple[tuple[int, ...], int, bytes]]


def write_gguf(folder: Path, kind: Literal["llama", "lfm2"], *, seed: int = 0) -> Path:
    """Write a model with matrices in Q8_0 beside the byte tokenizer, and return the file.

    lfm2: with attention alone. transformers keeps it packed, and reads it by itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save_pretrained(folder)
    target = folder / f"tiny-{kind}-Q8_0.gguf"
    target.write_bytes(_file(_metadata(kind), _tensors(kind, np.random.default_rng(seed))))
    return target


def _tensors(kind: str, rng: np.random.Generator) -> _Tensors:
    def matrix(rows: int, columns: int) -> tuple[tuple[int, ...], int, bytes]:
        values = rng.normal(scale=0.3, size=(rows, columns)).astype(np.float32)
        return (rows, columns), _Q8_0, _packed(values)

    def norm(width: int = WIDTH) -> tuple[tuple[int, ...], int, bytes]:
        return (width,), _F32, np.ones(width, np.float32).tobytes()

    last = {"llama": "output_norm", "lfm2": "token_embd_norm"}[kind]
    tensors = {
        "token_embd.weight": matrix(VOCAB_SIZE, WIDTH),
        f"{last}.weight": norm(),
        "output.weight": matrix(VOCAB_SIZE, WIDTH),
    }
    for layer in range(LAYERS):
        own = f"blk.{layer}."
        tensors |= {
            **{f"{own}attn_{x}.weight": matrix(WIDTH, WIDTH) for x in ("q", "k", "v", "output")},
            **{f"{own}ffn_{x}.weight": matrix(NEURONS, WIDTH) for x in ("gate", "up")},
            f"{own}ffn_down.weight": matrix(WIDTH, NEURONS),
            **{f"{own}{x}_norm.weight": norm() for x in ("attn", "ffn")},
        }
        if kind == "lfm2":
            tensors |= {f"{own}attn_{x}_norm.weight": norm(WIDTH // HEADS) for x in ("q", "k")}
    return tensors


def _metadata(kind: str) -> dict[str, _Value]:
    shared: dict[str, _Value] = {
        "general.architecture": kind,
        "general.name": "tiny",
        f"{kind}.vocab_size": VOCAB_SIZE,
        f"{kind}.context_length": CONTEXT,
        f"{kind}.embedding_length": WIDTH,
        f"{kind}.block_count": LAYERS,
        f"{kind}.feed_forward_length": NEURONS,
        f"{kind}.rope.dimension_count": WIDTH // HEADS,
        f"{kind}.rope.freq_base": 10_000.0,
        f"{kind}.attention.head_count": HEADS,
        f"{kind}.attention.head_count_kv": HEADS,
        f"{kind}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"t{number}" for number in range(VOCAB_SIZE)],
        "tokenizer.ggml.merges": ["t 1"],
        "tokenizer.ggml.eos_token_id": 1,
    }
    if kind == "lfm2":
        shared |= {"lfm2.attention.head_count_kv": [HEADS] * LAYERS, "lfm2.shortconv.l_cache": 3}
    return shared


def _packed(values: NDArray[np.float32]) -> bytes:
    """Pack by Q8_0: blocks of 32 values, a float16 scale and 32 signed bytes each."""
    blocks = values.reshape(-1, 32)
    scale = (np.abs(blocks).max(axis=1) / 127).astype(np.float16)
    whole = np.round(blocks / scale.astype(np.float32)[:, None]).clip(-127, 127).astype(np.int8)
    return b"".join(s.tobytes() + row.tobytes() for s, row in zip(scale, whole, strict=True))


def _file(metadata: dict[str, _Value], tensors: _Tensors) -> bytes:
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        kind, packed = _value(value)
        head.append(_text(key) + struct.pack("<I", kind) + packed)
    offset, data = 0, []
    for name, (shape, ggml_type, content) in tensors.items():
        dims = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head.append(_text(name) + struct.pack("<I", len(shape)) + dims)
        head.append(struct.pack("<IQ", ggml_type, offset))
        padded = content + bytes(-len(content) % _ALIGNMENT)
        data.append(padded)
        offset += len(padded)
    start = b"".join(head)
    return start + bytes(-len(start) % _ALIGNMENT) + b"".join(data)


def _value(value: _Value) -> tuple[int, bytes]:
    """Return the number of the value's type, and its bytes."""
    if isinstance(value, list):
        kind = _value(value[0])[0]
        items = b"".join(_value(one)[1] for one in value)
        return 9, struct.pack("<IQ", kind, len(value)) + items
    if isinstance(value, str):
        return 8, _text(value)
    return (
        (4, struct.pack("<I", value)) if isinstance(value, int) else (6, struct.pack("<f", value))
    )


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()
