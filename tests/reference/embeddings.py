"""Hidden states behind the last norm, by plain numpy in float64 from config.json and model.safetensors: the reference for embeddings.

    python3 tests/reference/embeddings.py > tests/goldens/embeddings/tiny.json

Nothing of the product is used here: safetensors is read by its own format, rotary embeddings turn halves.
"""

import json
import pathlib
import struct

import numpy as np

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
PROMPTS = [[40], [50, 51, 52, 53], [(7 * at * at + 13 * at + 5) % 500 for at in range(100)]]
TYPES = {"F32": np.float32, "F16": np.float16}


def tensors(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, base = json.loads(data[8 : 8 + length]), 8 + length
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            raw = data[base + begin : base + end]
            if entry["dtype"] == "BF16":
                values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                values = np.frombuffer(raw, TYPES[entry["dtype"]])
            yield name, values.reshape(entry["shape"]).astype(np.float64)


def norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotate(x, theta):
    length, _, dim = x.shape
    angles = np.arange(length)[:, None] * theta ** (-np.arange(0, dim, 2) / dim)[None, :]
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
    first, second = x[..., : dim // 2], x[..., dim // 2 :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def attend(x, layer, config):
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim, length = config["hidden_size"] // heads, len(x)

    def project(name, count):
        out = x @ layer(f"self_attn.{name}_proj.weight").T
        bias = layer(f"self_attn.{name}_proj.bias")
        return (out if bias is None else out + bias).reshape(length, count, dim)

    q, k = (rotate(project(name, count), config["rope_theta"]) for name, count in (("q", heads), ("k", kv_heads)))
    k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, project("v", kv_heads)))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(dim)
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("hqk,khd->qhd", weights, v).reshape(length, heads * dim)
    return out @ layer("self_attn.o_proj.weight").T


def mlp(x, layer):
    gate = x @ layer("mlp.gate_proj.weight").T
    inner = gate / (1 + np.exp(-gate)) * (x @ layer("mlp.up_proj.weight").T)
    return inner @ layer("mlp.down_proj.weight").T


def hidden_states(folder, prompt):
    config = json.loads((folder / "config.json").read_text())
    assert not config.get("rope_scaling") and not config.get("use_sliding_window")
    weights, eps = dict(tensors(folder / "model.safetensors")), config["rms_norm_eps"]
    x = weights["model.embed_tokens.weight"][prompt]
    for index in range(config["num_hidden_layers"]):
        def layer(name):
            return weights.get(f"model.layers.{index}.{name}")

        x = x + attend(norm(x, layer("input_layernorm.weight"), eps), layer, config)
        x = x + mlp(norm(x, layer("post_attention_layernorm.weight"), eps), layer)
    return norm(x, weights["model.norm.weight"], eps)


def unit(vector):
    return [round(float(value), 7) for value in vector / np.linalg.norm(vector)]


def main():
    models = {}
    for name in ("tiny-llama", "tiny-qwen2"):
        hidden = [hidden_states(GOLDENS / name, prompt) for prompt in PROMPTS]
        models[name] = {"last": [unit(h[-1]) for h in hidden], "mean": [unit(h.mean(0)) for h in hidden]}
    print(json.dumps({"prompts": PROMPTS, "models": models}))


main()
