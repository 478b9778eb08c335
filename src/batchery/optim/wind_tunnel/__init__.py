# SPDX-License-Identifier: Apache-2.0
"""The model wind tunnel: settings and sizes found on small models, for use on a large one."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
