# SPDX-License-Identifier: Apache-2.0
"""States of mechanisms as bytes: JSON, with tensors in base64. Reading them runs no code.

They are exact: numbers come back as they were, bit for bit, and on the CPU. What they hold is as
sensitive as the data.
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

    Example:
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
