"""The half of llama_cpp.py that runs in llama.cpp's own environment: a GGUF of random weights, and steps on request.

Reads one JSON object from stdin, the sizes; answers "ready BYTES" with the bytes of weights that one token reads. Then
each line "decode CONTEXT" or "prefill TOKENS" is one step, answered with its seconds.
Legend: L layers, D hidden, H heads, C head channels, E experts, K chosen, F expert width, V vocabulary.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

QUANT = gguf.GGMLQuantizationType.Q4_0
BLOCK, BLOCK_BYTES = gguf.GGML_QUANT_SIZES[QUANT]


def matrix(generator: np.random.Generator, *shape: int) -> np.ndarray:
    """Q4_0: blocks of an fp16 scale and 32 codes."""
    blocks = generator.integers(0, 256, (*shape[:-1], shape[-1] // BLOCK, BLOCK_BYTES), dtype=np.uint8)
    blocks[..., :2] = np.frombuffer(np.float16(0.004).tobytes(), dtype=np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def tensors(sizes: dict[str, int]) -> Iterator[tuple[str, np.ndarray, bool]]:
    """Name, values, and whether they are Q4_0, of a llama with experts."""
    generator = np.random.default_rng(0)
    D, C, E, F, V = (sizes[key] for key in ("hidden", "attention", "experts", "width", "vocabulary"))
    yield "token_embd.weight", matrix(generator, V, D), True
    yield "output_norm.weight", np.ones(D, dtype=np.float32), False
    for layer in range(sizes["layers"]):
        at = f"blk.{layer}"
        for norm in ("attn_norm", "ffn_norm"):
            yield f"{at}.{norm}.weight", np.ones(D, dtype=np.float32), False
        for name in ("attn_q", "attn_k", "attn_v"):
            yield f"{at}.{name}.weight", matrix(generator, C, D), True
        yield f"{at}.attn_output.weight", matrix(generator, D, C), True
        yield f"{at}.ffn_gate_inp.weight", generator.standard_normal((E, D), dtype=np.float32), False
        for name in ("ffn_gate_exps", "ffn_up_exps"):
            yield f"{at}.{name}.weight", matrix(generator, E, F, D), True
        yield f"{at}.ffn_down_exps.weight", matrix(generator, E, D, F), True


def write(path: Path, sizes: dict[str, int]) -> int:
    """A GGUF without a tokenizer; returns the bytes that one token reads."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(sizes["context"])
    writer.add_embedding_length(sizes["hidden"])
    writer.add_block_count(sizes["layers"])
    writer.add_feed_forward_length(sizes["width"])
    writer.add_head_count(sizes["heads"])
    writer.add_key_length(sizes["attention"] // sizes["heads"])
    writer.add_value_length(sizes["attention"] // sizes["heads"])
    writer.add_rope_dimension_count(sizes["attention"] // sizes["heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(sizes["experts"])
    writer.add_expert_used_count(sizes["chosen"])
    writer.add_vocab_size(sizes["vocabulary"])
    writer.add_tokenizer_model("no_vocab")
    read = 0
    for name, values, quantized in tensors(sizes):
        writer.add_tensor(name, values, raw_dtype=QUANT if quantized else None)
        share = sizes["chosen"] / sizes["experts"] if "_exps" in name else 1
        read += int(values.nbytes * share)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


class Peer:
    """llama.cpp with this file, as its own examples run it."""

    def __init__(self, path: Path, context: int, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params: Any = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        assert self._context, "llama.cpp does not take this model"
        self._filled = 0

    def prefill(self, tokens: int) -> float:
        """A prompt into the empty context."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._filled = tokens
        return self._run(tokens)

    def decode(self, context: int) -> float:
        """One token behind `context` others, which stay for the next."""
        if self._filled != context:
            self.prefill(context)
        seconds = self._run(1)
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), 0, context, -1)
        return seconds

    def _run(self, tokens: int) -> float:
        ids = (llama_cpp.llama_token * tokens)(
            *np.random.default_rng(time.time_ns()).integers(3, 1000, tokens).tolist()
        )
        batch = llama_cpp.llama_batch_get_one(ids, tokens)
        start = time.perf_counter()
        status = llama_cpp.llama_decode(self._context, batch)
        llama_cpp.llama_get_logits_ith(self._context, -1)
        seconds = time.perf_counter() - start
        assert status == 0, f"llama_decode said {status}"
        return seconds


def main() -> None:
    sizes = json.loads(sys.stdin.readline())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.gguf"
        read = write(path, sizes)
        peer = Peer(path, sizes["context"], sizes["threads"])
        print("ready", read, flush=True)
        for line in sys.stdin:
            kind, amount = line.split()
            print((peer.decode if kind == "decode" else peer.prefill)(int(amount)), flush=True)


if __name__ == "__main__":
    main()
