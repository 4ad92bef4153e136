"""A small SentencePiece vocabulary with byte fallback, as each of the files that hold one."""

from __future__ import annotations

import json
import struct
from functools import cache
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from isthmus.models.language.checkpoint.sentencepiece import Pieces

Style = Literal["prepend", "metaspace"]  # of a tokenizer.json: Llama 2's, and that of transformers 5
TokenizerFile = Literal["tokenizer.json", "tokenizer.model"]
SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2, as in Llama 2
TEXT = """The quick brown fox jumps over the lazy dog. Then the other dogs jumped over the foxes; they were there.
  for x in range(10):
      print(x, "hello world", 'hello there')
こんにちは世界。世界は広い。 Les élèves étaient là où l'été était.
"""
LLAMA2_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)


@cache
def tiny_pieces() -> Pieces:
    """Three special tokens, 256 bytes, then about 150 pieces of TEXT by falling score, as SentencePiece orders them."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = normalizers.Replace(" ", "▁"), pre_tokenizers.Split("\n", "removed")
    trained.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    characters = sorted(token for token in model["vocab"] if len(token) == 1)
    merged = list(dict.fromkeys(left + right for left, right in model["merges"]))
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *characters]
    scores = [0.0] * (len(SPECIAL) + 256) + [-float(rank) for rank in range(len(merged) + len(characters))]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(merged) + len(characters))
    return Pieces(tokens, scores, types)


def tokenizer_json(style: Style = "prepend", *, unigram: bool = False) -> tokenizers.Tokenizer:
    """The reference, made of the library's own parts as transformers' converters put them together."""
    pieces = tiny_pieces()
    if unigram:
        scored = list(zip(pieces.tokens, pieces.scores, strict=True))
        model: models.Model = models.Unigram(scored, 0, byte_fallback=True)
    else:
        vocabulary = {token: id for id, token in enumerate(pieces.tokens)}
        model = models.BPE(vocabulary, pieces.merges(), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    if style == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def gguf_fields(**changes: Any) -> dict[str, Any]:
    """The keys of a GGUF header; None takes one out."""
    pieces = tiny_pieces()
    content = {
        "model": "llama",
        "tokens": list(pieces.tokens),
        "scores": list(pieces.scores),
        "token_type": list(pieces.types),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in content.items() if value is not None}


def sentencepiece_model(pieces: Pieces, *, normalizer: bytes = b"\x20\x00") -> bytes:
    """A tokenizer.model. `normalizer`: fields of its NormalizerSpec; by default remove_extra_whitespaces is off."""
    data = b""
    for token, score, kind in zip(pieces.tokens, pieces.scores, pieces.types, strict=True):
        text = token.encode()
        data += field(1, field(1, text) + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind]))
    return data + field(2, bytes([0x18, 1 if pieces.unigram else 2])) + field(3, normalizer)


def field(number: int, data: bytes) -> bytes:
    """A field of bytes of a protocol buffer."""
    size, length = b"", len(data)
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + data


def write_tokenizer(folder: Path, kind: TokenizerFile) -> Path:
    """Replaces the tokenizer of a Hugging Face folder by this one."""
    (folder / "tokenizer.json").unlink(missing_ok=True)
    if kind == "tokenizer.json":
        tokenizer_json().save(str(folder / kind))
    else:
        (folder / kind).write_bytes(sentencepiece_model(tiny_pieces()))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    content = {**names, "chat_template": LLAMA2_TEMPLATE, "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder
