"""torch.compile with a way back."""

from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch
from torch._dynamo.exc import TorchDynamoException

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Compiled(Generic[Arguments, Result]):
    """`function` by torch.compile, for shapes that repeat; as it is once compiling has failed, which is told.

    `name` is what the message calls it. A compiled network rounds in another order.
    """

    def __init__(self, function: Callable[Arguments, Result], name: str):
        self._function, self._name = function, name
        self._fast: Callable[Arguments, Result] | None = torch.compile(function, dynamic=False)

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if self._fast is not None:
            try:
                return self._fast(*args, **kwargs)
            except TorchDynamoException as error:
                self._fast = None
                reason = " ".join(str(error).split())[:200] or repr(error)
                print(
                    f"note: torch.compile of the {self._name} has failed ({reason}); it runs uncompiled, and "
                    "slower (hardware.compile: false says so from the start)",
                    flush=True,
                )
        return self._function(*args, **kwargs)
