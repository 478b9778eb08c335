# SPDX-License-Identifier: Apache-2.0
"""Models made small enough to batch."""
