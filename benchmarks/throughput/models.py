"""A Llama with random weights, its tokenizer and a corpus, in one folder that every arm loads.

python -m benchmarks.throughput.models 8b FOLDER
"""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path

from benchmarks.throughput.data import CORPUS_FILE
from benchmarks.throughput.shapes import SHAPES

SEED = 1234
CORPUS_CHARACTERS = 600_000
TOKENS = 4_096
COMPLETE = "complete"  # Written last: a folder without it is built again.


def build(name: str, folder: Path) -> None:
    """Writes the model of a shape: bf16 on a GPU, fp32 elsewhere."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    _tokenizer(folder)
    cuda = torch.cuda.is_available()
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16 if cuda else torch.float32)
    with torch.device("cuda" if cuda else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[name].config()))
    model.save_pretrained(folder, max_shard_size="4GB")
    (folder / COMPLETE).touch()


def _tokenizer(folder: Path) -> None:
    """A byte-level BPE of the standard library's sources, and their token ids: real text that needs no download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="ignore"))
        if sum(map(len, texts)) > CORPUS_CHARACTERS:
            break
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(
        folder
    )
    ids = [token for text in texts for token in bpe.encode(text, add_special_tokens=False).ids]
    (folder / CORPUS_FILE).write_text(json.dumps(ids), encoding="utf-8")


if __name__ == "__main__":
    build(sys.argv[1], Path(sys.argv[2]))
