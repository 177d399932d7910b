"""torch.compile with a way back."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Generic, ParamSpec, TypeVar

import torch
import torch._functorch.config
import torch._inductor.config
from torch._dynamo.exc import TorchDynamoException

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Compiled(Generic[Arguments, Result]):
    """`function` by torch.compile, for shapes that repeat; as it is once compiling has failed, which is told.

    The backward pass is compiled with the forward pass, so that it fails where nothing has been computed
    yet. `name` is what the message calls it. A compiled network rounds in another order.
    """

    def __init__(self, function: Callable[Arguments, Result], name: str):
        self._function, self._name = function, name
        self._fast: Callable[Arguments, Result] | None = torch.compile(function, dynamic=False)

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if self._fast is None:
            return self._function(*args, **kwargs)
        try:
            with ExitStack() as stack:  # set here, as it belongs to a thread, and autograd has its own
                stack.enter_context(torch._functorch.config.patch(force_non_lazy_backward_lowering=True))
                if torch.are_deterministic_algorithms_enabled():
                    stack.enter_context(torch._inductor.config.patch(deterministic=True))
                return self._fast(*args, **kwargs)
        except TorchDynamoException as error:
            result = self._function(*args, **kwargs)  # if this fails as well, it was not for compiling
            self._fast = None
            reason = " ".join(str(error).split())[:200] or repr(error)
            print(
                f"note: torch.compile of the {self._name} has failed ({reason}); it runs uncompiled, and "
                "slower (hardware.compile: false says so from the start)",
                flush=True,
            )
            return result
