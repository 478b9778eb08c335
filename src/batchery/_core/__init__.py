# SPDX-License-Identifier: Apache-2.0
"""Private foundations: argument checks, collectives, atomic files, seeds. Nothing of the field."""
