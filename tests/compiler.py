# SPDX-License-Identifier: Apache-2.0
"""Marks what needs a C compiler, which a machine that runs the tests may lack."""

import pytest
import torch

from batchery.kernels.native import native_ready

compiled = pytest.mark.skipif(not native_ready(torch.float32), reason="needs a C compiler")


def needs_compiler(value):
    return pytest.param(value, marks=compiled)
