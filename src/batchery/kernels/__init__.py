# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, each with its torch reference in the same file."""
