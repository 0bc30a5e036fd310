"""The training steps of benchmarks.model_steps under torch.compile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from benchmarks.model_steps import MODEL_STEPS, ModelStep
from benchmarks.sides import SEED
from gmkernels import noise, train

# A GPT's graph has a test of its own in test_gpt.py.
TRAINED = {s.name: s for s in MODEL_STEPS if s.samples is None and s.name != "GPT"}


@pytest.mark.parametrize("step", TRAINED.values(), ids=lambda step: step.name)
def test_our_steps_compile_whole_and_once(step: ModelStep) -> None:
    """Three updates, three keys: one graph each way, our operators in both, and eager's losses."""
    graphs: list[tuple[str, int]] = []

    def compiler(way: str) -> Callable[..., Any]:
        def take(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            targets = [str(n.target) for n in graph.graph.nodes]
            graphs.append((way, sum(name.startswith("gmkernels.") for name in targets)))
            return make_boxed_func(graph.forward)

        return take

    ways = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))

    def losses(compiled: bool) -> Tensor:
        torch.manual_seed(SEED)
        model: Any = step.model()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        x = step.batch()[:4]
        train.training_step(model, optimizer, x, seed=noise.key(9))  # ActNorm learns its start
        if compiled:
            model.loss = torch.compile(model.loss, dynamic=False, fullgraph=True, backend=ways)
        keys = (noise.key(i) for i in range(3))
        return torch.stack([train.training_step(model, optimizer, x, seed=k) for k in keys])

    torch._dynamo.reset()
    torch.testing.assert_close(losses(True), losses(False))
    assert [way for way, _ in graphs] == ["forward", "backward"]
    assert min(ours for _, ours in graphs) > 0
