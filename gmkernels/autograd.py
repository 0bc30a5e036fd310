"""The one helper that makes an op differentiable, whatever asks for the derivative.

- eager mode: a ctx-style autograd.Function whose backward is a second such Function, both calling
  the registered operators below autograd;
- under torch.compile and torch.export: the registered operators themselves, with autograd
  registered on the forward and on the backward operator;
- under torch.func and forward-mode AD: the reference formula, which PyTorch differentiates.

Second derivatives are taken through the reference formula everywhere.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    maybe_current_level,
)
from torch.autograd import forward_ad

from gmkernels import dispatch
from gmkernels.checks import in_rows

Arguments = tuple[Any, ...]
BelowAutograd = torch._C._AutoDispatchBelowAutograd


def is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is active; never while Dynamo traces."""
    return not torch.compiler.is_compiling() and _is_transformed()


def _is_transformed() -> bool:
    return maybe_current_level() is not None or forward_ad._current_level >= 0


def is_batched(x: Any) -> bool:
    """Whether vmap maps over this tensor at any level."""
    while isinstance(x, Tensor) and is_functorch_wrapped_tensor(x):
        if is_batchedtensor(x):
            return True
        x = get_unwrapped(x)
    return False


class DifferentiableOp:
    """An op with a forward and a backward operator on each backend.

    The operators of `name` take `inputs` differentiable tensors (or None) first and constants after
    them (the noise key, floats, ints); backward takes the `outputs` gradients (or None) before
    these and a bit mask of the wanted inputs after them, and returns `inputs` gradients, empty
    where not wanted. Backward reads the inputs alone: nothing else is saved, unless the forward
    operator keeps something for it. Then that takes one more argument, the bool `keep`, and returns
    `kept` further tensors (empty if not keep); backward takes them after the output gradients. With
    `keeps_outputs` it is the outputs themselves that backward takes there, and there is no `keep`.

    Args:
        name: of the op, as in the dispatch table.
        reference: the formula in plain PyTorch on the same arguments, returning a tuple.
        inputs, outputs, kept: how many tensors.
        keeps_outputs: whether backward reads the outputs; then kept is not given.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., tuple[Tensor, ...]],
        *,
        inputs: int,
        outputs: int,
        kept: int = 0,
        keeps_outputs: bool = False,
    ) -> None:
        self.name = name
        self.reference = reference
        self.inputs = inputs
        self.outputs = outputs
        self.kept = outputs if keeps_outputs else kept
        self.takes_keep = kept > 0
        self.first_kept = 0 if keeps_outputs else outputs  # among the results of forward
        self.tensors = inputs  # leading arguments that are tensors or None, known from a schema
        self.backward_function = _make_backward_function(self)
        # Function.apply's own checks are of torch.func alone, which never comes here: 3 us a call.
        function = _make_forward_function(self)
        self.apply_forward = super(torch.autograd.Function, function).apply  # type: ignore[misc]
        for backend, namespace in dispatch.NAMESPACES.items():
            found = dispatch.find(name, backend)
            if isinstance(found, dispatch.Kernel):
                self.tensors = _leading_tensors(found.forward)
                self._register(backend, f"{namespace}::{name}")

    def __call__(self, backend: str, *args: Any) -> tuple[Tensor, ...]:
        """Runs the op on the backend that dispatch.choose() gave."""
        if backend == "reference":
            return self.reference(*args)
        if torch.compiler.is_compiling():
            keep = self.takes_keep and self._is_differentiated(args)
            return self.run_forward(backend, args, keep)[: self.outputs]
        if _is_transformed():
            return self.reference(*args)
        if self._is_differentiated(args):
            return self.apply_forward(backend, *args)
        with BelowAutograd():
            return self.run_forward(backend, args, False)[: self.outputs]

    def _is_differentiated(self, args: Arguments) -> bool:
        if torch.is_grad_enabled():
            for x in args[: self.inputs]:
                if x is not None and x.requires_grad:
                    return True
        return False

    def run_forward(self, backend: str, args: Arguments, keep: bool) -> tuple[Tensor, ...]:
        """The outputs, and after them what is kept."""
        forward = dispatch.kernel(self.name, backend).forward
        results = forward(*args, keep) if self.takes_keep else forward(*args)
        return (results,) if isinstance(results, Tensor) else tuple(results)

    def run_backward(
        self, backend: str, grads: Arguments, args: Arguments, needs: int
    ) -> tuple[Tensor, ...]:
        """args: what was kept, and the inputs and constants."""
        backward = dispatch.kernel(self.name, backend).backward
        assert backward is not None
        rows = [g if g is None else in_rows(g) for g in grads]
        results = backward(*rows, *args, needs)
        return results if self.inputs > 1 else (results,)

    def second_derivatives(
        self, grads: Arguments, args: Arguments, needs: int, cotangents: Arguments
    ) -> list[Tensor | None]:
        """Gradients of the backward operator to its tensors, through the reference."""
        create_graph = torch.is_grad_enabled()
        args = args[self.kept :]
        with torch.enable_grad():
            # Aliases: an argument given twice must not collect the other one's gradient.
            xs = [_alias(x, create_graph) for x in args[: self.inputs]]
            gs = [_alias(g, create_graph) for g in grads]
            outs = self.reference(*xs, *args[self.inputs :])
            pairs = [
                (o, g) for o, g in zip(outs, gs, strict=True) if g is not None and o.requires_grad
            ]
            wanted = [x for i, x in enumerate(xs) if needs >> i & 1 and x is not None]
            firsts = torch.autograd.grad(
                [o for o, _ in pairs],
                wanted,
                [g.to(o.dtype) for o, g in pairs],
                create_graph=True,
                allow_unused=True,
            )
            given = [c for i, c in enumerate(cotangents) if needs >> i & 1 and args[i] is not None]
            terms = [
                (f, c)
                for f, c in zip(firsts, given, strict=True)
                if f is not None and c is not None and f.requires_grad
            ]
            leaves = [x for x in (*gs, *xs) if x is not None]
            seconds: list[Tensor | None] = [None] * len(leaves)
            if terms:
                seconds = list(
                    torch.autograd.grad(
                        [f for f, _ in terms],
                        leaves,
                        [c for _, c in terms],
                        create_graph=create_graph,
                        allow_unused=True,
                    )
                )
        found = iter(seconds)
        made = [None if x is None else next(found) for x in (*gs, *xs)]
        return [*made[: self.outputs], *(None,) * self.kept, *made[self.outputs :]]

    def _register(self, backend: str, qualified: str) -> None:
        inputs, outputs, kept = self.inputs, self.outputs, self.kept

        def setup_forward(ctx: Any, inputs: Arguments, output: Any) -> None:
            ctx.set_materialize_grads(False)
            if self.takes_keep:
                ctx.mark_non_differentiable(*output[outputs:])
                inputs = inputs[:-1]
            saved = (*output[self.first_kept :], *inputs) if kept else inputs
            _save(ctx, saved, kept + self.tensors)

        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            args = _saved(ctx)
            constants = len(args) - kept - inputs + self.takes_keep
            if not _any_given(grads[:outputs]):
                return (None,) * (inputs + constants)
            needs = _mask(ctx.needs_input_grad[:inputs])
            made = self.run_backward(backend, grads[:outputs], args, needs)
            return (*_wanted(made, args[kept:], needs), *(None,) * constants)

        def setup_backward(ctx: Any, inputs: Arguments, output: Any) -> None:
            ctx.set_materialize_grads(False)
            ctx.needs = inputs[-1]
            _save(ctx, inputs[:-1], outputs + kept + self.tensors)

        def second(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
            everything = _saved(ctx)
            made = self.second_derivatives(
                everything[:outputs], everything[outputs:], ctx.needs, cotangents
            )
            return (*made, *(None,) * (len(everything) + 1 - len(made)))

        torch.library.register_autograd(
            f"{qualified}_forward", backward, setup_context=setup_forward
        )
        torch.library.register_autograd(
            f"{qualified}_backward", second, setup_context=setup_backward
        )


def _alias(x: Tensor | None, create_graph: bool) -> Tensor | None:
    if x is None:
        return None
    if create_graph and x.requires_grad:
        return x.view_as(x)
    return x.detach().requires_grad_()


def _leading_tensors(operator: Any) -> int:
    """How many of an operator's arguments are tensors or None: they come before all others."""
    kinds = [str(a.type) for a in operator._schema.arguments]
    count = sum(kind in ("Tensor", "Optional[Tensor]") for kind in kinds)
    assert all("Tensor" in kind for kind in kinds[:count]), f"{operator}: tensors come first"
    return count


def _any_given(grads: Arguments) -> bool:
    for g in grads:  # noqa: SIM110 - a plain loop: this is on the path of every backward
        if g is not None:
            return True
    return False


def _mask(needs: tuple[bool, ...]) -> int:
    mask = 0
    for i, needed in enumerate(needs):
        mask |= needed << i
    return mask


def _wanted(made: tuple[Tensor, ...], args: Arguments, needs: int) -> list[Tensor | None]:
    return [g if needs >> i & 1 and args[i] is not None else None for i, g in enumerate(made)]


def _save(ctx: Any, args: Arguments, tensors: int) -> None:
    # The key is a tensor, too, and saved like one; what follows the tensors are floats and ints.
    ctx.save_for_backward(*args[:tensors])
    ctx.constants = args[tensors:]


def _saved(ctx: Any) -> Arguments:
    return (*ctx.saved_tensors, *ctx.constants)


def _make_forward_function(op: DifferentiableOp) -> type[torch.autograd.Function]:
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, backend: str, *args: Any) -> Any:  # type: ignore[override]
            ctx.set_materialize_grads(False)
            ctx.backend = backend
            with BelowAutograd():
                results = op.run_forward(backend, args, True)
            saved = (*results[op.first_kept :], *args) if op.kept else args
            _save(ctx, saved, op.kept + op.tensors)
            return results[: op.outputs]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:  # type: ignore[override]
            args = _saved(ctx)
            constants = len(args) - op.kept - op.inputs
            if not _any_given(grads):
                return (None,) * (1 + op.inputs + constants)
            needs = _mask(ctx.needs_input_grad[1 : 1 + op.inputs])
            if torch.is_grad_enabled():
                made = op.backward_function.apply(ctx.backend, needs, *grads, *args)
            else:
                with BelowAutograd():
                    made = op.run_backward(ctx.backend, grads, args, needs)
            return (None, *_wanted(made, args[op.kept :], needs), *(None,) * constants)

    Forward.__name__ = Forward.__qualname__ = op.name
    return Forward


def _make_backward_function(op: DifferentiableOp) -> type[torch.autograd.Function]:
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, backend: str, needs: int, *args: Any) -> Any:  # type: ignore
            ctx.set_materialize_grads(False)
            ctx.needs = needs
            _save(ctx, args, op.outputs + op.kept + op.tensors)
            with BelowAutograd():
                return op.run_backward(backend, args[: op.outputs], args[op.outputs :], needs)

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> Any:  # type: ignore[override]
            everything = _saved(ctx)
            made = op.second_derivatives(
                everything[: op.outputs], everything[op.outputs :], ctx.needs, cotangents
            )
            return (None, None, *made, *(None,) * (len(everything) - len(made)))

    Backward.__name__ = Backward.__qualname__ = f"{op.name}_backward"
    return Backward
