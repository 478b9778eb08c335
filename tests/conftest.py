# SPDX-License-Identifier: Apache-2.0
import os

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter, which must be chosen before any of them is defined.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(
    params=[
        pytest.param("cpu", id="interpreted"),
        pytest.param("cuda", id="compiled", marks=pytest.mark.gpu),
    ]
)
def kernel_device(request):
    """Where Triton kernels run: compiled on CUDA, or interpreted where there is none."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled here")
    return torch.device(request.param)
