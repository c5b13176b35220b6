"""A small byte-pair tokenizer in CLIP's own format (vocab.json + merges.txt), trained on captions and emoji names.

The base alphabet is CLIP's: all 256 bytes, alone and as the end of a word, so any text encodes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's word pattern


def emoji_names() -> list[str]:
    """English CLDR names (PyPI `emoji`): common words that the captions lack."""
    from emoji import EMOJI_DATA

    return sorted({str(entry["en"]).strip(":").replace("_", " ").lower() for entry in EMOJI_DATA.values()})


def train(captions: Iterable[str], size: int = 2048) -> tuple[dict[str, int], list[str]]:
    """Vocabulary (token to id, `size` at most) and merges, in CLIP's order: bytes, word ends, merges, specials."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator([*captions, *emoji_names()], trainer)
    learned = [
        " ".join(pair) if isinstance(pair, list) else pair for pair in json.loads(tokenizer.to_str())["model"]["merges"]
    ]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = size - 2 * len(alphabet) - 2
    merges: list[str] = []
    tokens = dict.fromkeys([*alphabet, *(letter + "</w>" for letter in alphabet)])
    for merge in learned:
        joined = merge.replace(" ", "")
        if len(merges) == room:
            break
        if joined not in tokens:
            merges.append(merge)
            tokens[joined] = None
    vocabulary = {token: index for index, token in enumerate([*tokens, START, END])}
    return vocabulary, merges


def write(folder: Path, vocabulary: dict[str, int], merges: list[str]) -> None:
    """Write the files that transformers' CLIPTokenizer (and so both hosts) reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
        "do_lower_case": True,
        "add_prefix_space": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def load(folder: Path):
    """The folder's tokenizer as transformers' CLIPTokenizer."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(folder))
