# SPDX-License-Identifier: Apache-2.0
"""Everything about the batch: which examples enter it, how large it is, how far its step goes.

Importing this package imports nothing heavy: `from batchery.optim import LAMB` loads LAMB alone.
"""

__version__ = "0.1.0"
