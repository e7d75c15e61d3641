"""What tests of several rooms share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from titan_fp8.errors import UserError


def refusal(call: Callable[[], object], *words: str) -> str:
    """The one-line UserError of `call`, which must contain all `words`."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message
