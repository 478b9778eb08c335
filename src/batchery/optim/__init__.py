# SPDX-License-Identifier: Apache-2.0
"""How large the batch is, and how far the step goes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
