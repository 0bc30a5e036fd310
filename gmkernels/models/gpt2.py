"""The weights of transformers' GPT-2 in our GPT, and back."""

import torch
from torch import Tensor

from gmkernels.models.gpt import GPT, Sizes

_TOP = {"wte": "token", "wpe": "position", "ln_f": "norm"}
_LAYER = {
    "ln_1": "norm1",
    "attn.c_attn": "qkv",
    "attn.c_proj": "out",
    "ln_2": "norm2",
    "mlp.c_fc": "up",
    "mlp.c_proj": "down",
}  # their Conv1D's weights are [in, out], our Linear's [out, in]


def _renamed(state: dict[str, Tensor], old: str, new: str, names: dict[str, str]) -> dict:
    """What lies under `old` in a state dict, under `new`, by the names of its parts."""
    found = {}
    for part, ours in names.items():
        for kind in ("weight", "bias"):
            if (x := state.get(f"{old}{part}.{kind}")) is not None:
                turned = x.dim() == 2 and names.keys() & {"attn.c_attn", "qkv"}
                found[f"{new}{ours}.{kind}"] = x.T if turned else x
    return found


def from_gpt2(state: dict[str, Tensor], heads: int) -> GPT:
    """A GPT with the weights of a state dict of transformers' GPT2LMHeadModel or GPT2Model.

    Sizes are read from the shapes, heads from the caller, as no shape tells them. For models of the
    standard layout: gelu_new, layer_norm_epsilon 1e-5, scores scaled by 1 / sqrt(D).
    Raises ValueError for other names, and RuntimeError of PyTorch for weights that are missing.
    """
    state = {name.removeprefix("transformer."): x for name, x in state.items()}
    if not {"wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight"} <= state.keys():
        raise ValueError(
            "from_gpt2: state must hold wte.weight, wpe.weight and h.0.mlp.c_fc.weight, as that of "
            f"a GPT2LMHeadModel does, got {', '.join(list(state)[:3])}, ..."
        )
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("h."))
    made = _renamed(state, "", "", _TOP)
    for i in range(layers):
        made |= _renamed(state, f"h.{i}.", f"layers.{i}.", _LAYER)
    (vocab, width), context = state["wte.weight"].shape, len(state["wpe.weight"])
    hidden = state["h.0.mlp.c_fc.weight"].shape[1]
    head = state.get("lm_head.weight", state["wte.weight"])
    tied = torch.equal(head, state["wte.weight"])
    if not tied:
        made["head.weight"] = head
    model = GPT(Sizes(vocab, context, layers, heads, width, hidden=hidden, tied=tied))
    model.load_state_dict(made)
    return model


def to_gpt2(model: GPT) -> dict[str, Tensor]:
    """The state dict of a GPT2LMHeadModel with a GPT's weights.

    Raises ValueError for a GPT that is no GPT-2: learned positions, LayerNorm, as many heads of
    keys, bias, no norms of heads, no marks.
    """
    s, same = model.sizes, Sizes(1)
    for name in ("positions", "norm", "bias", "qk_norm", "marks"):
        if getattr(s, name) != getattr(same, name):
            raise ValueError(
                f"to_gpt2: {name} must be {getattr(same, name)}, got {getattr(s, name)}"
            )
    if s.kv_heads not in (None, s.heads):
        raise ValueError(f"to_gpt2: kv_heads must be None or {s.heads}, got {s.kv_heads}")
    state = model.state_dict()
    made = _renamed(state, "", "transformer.", {ours: theirs for theirs, ours in _TOP.items()})
    back = {ours: theirs for theirs, ours in _LAYER.items()}
    for i in range(s.layers):
        made |= _renamed(state, f"layers.{i}.", f"transformer.h.{i}.", back)
    made["lm_head.weight"] = state["token.weight" if s.tied else "head.weight"]
    return made
