# SPDX-License-Identifier: Apache-2.0
"""States of mechanisms as bytes: JSON, with tensors in base64. Reading them runs no code.

They are exact: numbers come back as they were, bit for bit, and on the CPU. What they hold is as
sensitive as the data. A part of a state that does not fit its place is refused, never stretched.
"""

import base64
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_TENSOR = "__tensor__"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool,
        torch.uint8,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    )
}


def state_to_bytes(state: Mapping[str, Any]) -> bytes:
    """Write a state: mappings with string keys, lists, tensors and plain values.

    Raises:
        TypeError: the state holds something else.

    Examples:
        >>> state_from_bytes(state_to_bytes({"t": 1, "sums": torch.tensor([3, 4])}))
        {'t': 1, 'sums': tensor([3, 4])}
    """
    return json.dumps(_plain(state), separators=(",", ":")).encode()


def state_from_bytes(data: bytes) -> dict[str, Any]:
    """Read what `state_to_bytes` wrote.

    Raises:
        ValueError: these are not such bytes.
    """
    found: dict[str, Any] = json.loads(data, object_hook=_tensor)
    return found


class Misfit(ValueError):
    """A part of a state does not fit its place; the message is for its owner to complete."""


def fill_(tensor: Tensor, state: Mapping[str, Any], name: str) -> None:
    """Copy a part of a state into a tensor of its shape and dtype, on whatever device.

    Raises:
        Misfit: it is no such tensor; nothing has been copied.

    Examples:
        >>> fill_(torch.zeros(2), {"sums": torch.zeros(1)}, "sums")
        Traceback (most recent call last):
        batchery.privacy.saved_state.Misfit: 'sums' as float32 [2], got float32 [1]
    """
    found = state[name]
    if kind_of(found) != kind_of(tensor):
        raise Misfit(f"{name!r} as {kind_of(tensor)}, got {kind_of(found)}")
    tensor.copy_(found)


def same_step(state: Mapping[str, Any], t: int) -> int:
    """Return the step that a part of a state is at, which must be that of the whole.

    Raises:
        Misfit: it is another.
    """
    if state["t"] != t:
        raise Misfit(f"'t' of {t} in all its parts, got {state['t']!r}")
    return t


def kind_of(value: Any) -> str:
    """Return dtype and shape of a tensor, or the type of what is none, as messages show them."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {[*value.shape]}"


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy().tobytes()
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise TypeError(f"state_to_bytes: state must not hold a tensor of {dtype}")
        return {_TENSOR: [dtype, list(value.shape), base64.b64encode(raw).decode()]}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _tensor(found: dict[str, Any]) -> Any:
    if _TENSOR not in found:
        return found
    name, shape, raw = found[_TENSOR]
    data = bytearray(base64.b64decode(raw))
    # An empty buffer cannot be viewed.
    flat = torch.frombuffer(data, dtype=_DTYPES[name]) if data else torch.empty(0).to(_DTYPES[name])
    return flat.reshape(shape)
