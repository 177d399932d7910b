"""What a mistake of the user looks like from outside."""

from collections.abc import Callable

import pytest

from drift.runtime.errors import UserError


def complaint(call: Callable[[], object]) -> str:
    """The message of the UserError that `call` raises, which must be one line."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message
