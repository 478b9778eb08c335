# SPDX-License-Identifier: Apache-2.0
"""A SHA-256 of each tensor in the metadata of its safetensors file.

`save_quantized` and `save_pretrained` write them; loaders compare them with what they read, so that
bytes which a disk, a copy or a tool changed are found before anything is computed with them. When
not: against an enemy. Who changes a tensor can change its digest, or leave all of them out: files
without any, as other tools write them, are read as they are.

    metadata["batchery.sha256"] = {name: SHA-256 of "name shape dtype", then the tensor's bytes}

Names that changed places, shapes and dtypes are found like changed bytes. A file may list more
names than it has: transformers gives all files of a folder the same metadata.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from batchery._core.validate import require

__all__ = ["digest_of_tensors", "digests_in", "digests_of", "require_unchanged"]

KEY = "batchery.sha256"


def digest_of_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes, in the order given.

    Examples:
        >>> x = torch.ones(2, 3)
        >>> one, turned = digest_of_tensors([("x", x)]), digest_of_tensors([("x", x.t())])
        >>> len(one), one == turned
        (64, False)
    """
    digest = hashlib.sha256()
    for name, value in named:
        data = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(data.numpy().data)  # no copy
    return digest.hexdigest()


def digests_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the metadata of a file that holds some tensors.

    Examples:
        >>> import torch
        >>> metadata = digests_of({"x": torch.ones(2)})
        >>> sorted(digests_in("me", "x.safetensors", metadata))
        ['x']
    """
    return {
        KEY: json.dumps(
            {name: digest_of_tensors([(name, tensor)]) for name, tensor in tensors.items()}
        )
    }


def digests_in(owner: str, file: str, metadata: Mapping[str, str] | None) -> dict[str, str] | None:
    """Return what a file's metadata lists, or None; a ValueError if that is no list of digests.

    Examples:
        >>> digests_in("me", "x.safetensors", {"format": "pt", "batchery.sha256": '{"x": "ab12"}'})
        {'x': 'ab12'}
    """
    text = (metadata or {}).get(KEY)
    if text is None:
        return None
    try:
        listed = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{owner}: {KEY} in {file} is damaged: {error}") from error
    require(isinstance(listed, dict), owner, f"{KEY} in {file}", "must be a table", listed)
    return dict(listed)


def require_unchanged(
    owner: str, file: str, listed: Mapping[str, str] | None, name: str, tensor: Tensor
) -> None:
    """Raise a ValueError unless a tensor is as the writer of its file left it.

    Examples:
        >>> x = torch.ones(2)
        >>> listed = {"x": digest_of_tensors([("x", x)])}
        >>> require_unchanged("me", "x.safetensors", listed, "x", x)
        >>> require_unchanged("me", "x.safetensors", listed, "x", x + 1)
        Traceback (most recent call last):
        ValueError: me: x in x.safetensors was changed after it was written
    """
    if listed is None:
        return
    if name not in listed:
        raise ValueError(f"{owner}: {name} was added to {file} after it was written")
    if listed[name] != digest_of_tensors([(name, tensor)]):
        raise ValueError(f"{owner}: {name} in {file} was changed after it was written")
