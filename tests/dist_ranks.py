# SPDX-License-Identifier: Apache-2.0
"""Runs a function on several gloo ranks and hands back what each returned."""

import os
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank(rank, size, function, arguments, folder):
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
        )
        result = function(rank, size, *arguments)
        torch.save(("ok", result), f"{folder}/{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        torch.save(("error", traceback.format_exc()), f"{folder}/{rank}.pt")
        raise
    # The result is on disk. Taking the interpreter down beside gloo's threads has aborted, rarely.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_on_ranks(function, *arguments, size=2):
    """Call `function(rank, size, *arguments)` on each rank; return the results by rank.

    The function must be importable (a module's top level); its result must survive torch.save.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(_rank, (size, function, arguments, folder), nprocs=size)
        except Exception as error:
            for path in sorted(Path(folder).glob("*.pt")):
                kind, trace = torch.load(path, weights_only=False)
                if kind == "error":
                    raise AssertionError(f"rank {path.stem} failed:\n{trace}") from error
            raise
        found = [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(size)]
    return [result for _, result in found]
