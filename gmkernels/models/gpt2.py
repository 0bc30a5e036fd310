"""The weights of transformers' GPT-2 in our GPT."""

import torch
from torch import Tensor

from gmkernels.models.gpt import GPT, Sizes


def from_gpt2(state: dict[str, Tensor], heads: int) -> GPT:
    """A GPT with the weights of a state dict of transformers' GPT2LMHeadModel or GPT2Model.

    Sizes are read from the shapes, heads from the caller, as no shape tells them. For models of the
    standard layout: gelu_new, layer_norm_epsilon 1e-5, scores scaled by 1 / sqrt(D). Weights of its
    Conv1D are [in, out] and are transposed. Raises ValueError for other names.
    """
    state = {name.removeprefix("transformer."): x for name, x in state.items()}
    if "wte.weight" not in state or "h.0.attn.c_attn.weight" not in state:
        raise ValueError(
            "from_gpt2: state must hold wte.weight, wpe.weight and h.0.attn.c_attn.weight, "
            f"got {', '.join(list(state)[:3])}, ..."
        )
    parts = {"ln_1": "norm1", "attn.c_attn": "qkv", "attn.c_proj": "out"}
    parts |= {"ln_2": "norm2", "mlp.c_fc": "up", "mlp.c_proj": "down"}
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("h."))
    made = {"token.weight": state["wte.weight"], "position.weight": state["wpe.weight"]}
    made |= {f"norm.{kind}": state[f"ln_f.{kind}"] for kind in ("weight", "bias")}
    for i in range(layers):
        for theirs, ours in parts.items():
            made[f"layers.{i}.{ours}.bias"] = state[f"h.{i}.{theirs}.bias"]
            weight = state[f"h.{i}.{theirs}.weight"]
            made[f"layers.{i}.{ours}.weight"] = weight.T if weight.dim() == 2 else weight
    (vocab, width), context = state["wte.weight"].shape, len(state["wpe.weight"])
    head = state.get("lm_head.weight", state["wte.weight"])
    tied = torch.equal(head, state["wte.weight"])
    if not tied:
        made["head.weight"] = head
    hidden = len(made["layers.0.up.weight"])
    sizes = Sizes(vocab, context, layers, heads, width, hidden=hidden, tied=tied)
    model = GPT(sizes)
    model.load_state_dict(made)
    return model
