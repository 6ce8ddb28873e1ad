"""What llama.cpp makes of GGUF files, asked in an environment of its own: `python load_back_gguf_other.py REQUEST`.

It needs llama-cpp-python and numpy alone. The request names files, texts and prompts; the answer is written beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def asked(file: str, texts: list[str], prompt: list[int], most: int) -> dict[str, Any]:
    """Token ids of the texts, the greedy answer to a prompt, and the log-probabilities after it."""
    import numpy as np
    from llama_cpp import Llama

    llm = Llama(file, n_ctx=512, n_threads=1, logits_all=True, verbose=False)
    ids = [llm.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
    llm.reset()
    llm.eval(prompt)
    scores = np.array(llm.scores[: llm.n_tokens], dtype=np.float64)
    logprobs = scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)
    answer: list[int] = []
    while len(answer) < most:
        answer.append(int(np.argmax(llm.scores[llm.n_tokens - 1])))
        llm.eval(answer[-1:])
    return {"ids": ids, "answer": answer, "logprobs": logprobs.tolist()}


def main() -> None:
    import llama_cpp

    path = Path(sys.argv[1])
    request = json.loads(path.read_text(encoding="utf-8"))
    told = {name: asked(**question) for name, question in request.items()}
    answer = {"version": llama_cpp.__version__, "told": told}
    path.with_suffix(".answer.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
