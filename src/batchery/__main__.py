# SPDX-License-Identifier: Apache-2.0
"""Starts the `batchery` command, so that Ctrl-C while its modules load brings no traceback."""

import sys


def main() -> int:
    """Run the command line and return its exit status."""
    try:
        from batchery.cli import main as run

        return run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on from here\n")
        return 130  # as `cli.INTERRUPTED`


if __name__ == "__main__":
    sys.exit(main())
