# SPDX-License-Identifier: Apache-2.0
"""Check the forms of the wide four-bit kernel on an H100 or H200, and time them beside cuBLAS.

About 60 s. What `w4a16_plan` chooses among the forms rests on this.
"""

import functools
import json
import math
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from marlin import CALLS, microseconds  # noqa: E402
from marlin_backends import SHAPES, copies, fresh, packed, random  # noqa: E402

FORMS = {  # batch, rows, turns, words
    "tall": (128, 256, 2, 2),
    "long": (256, 128, 1, 2),
    "small": (128, 128, 2, 3),
    "t64": (64, 256, 3, 3),
    "s64": (64, 128, 4, 5),
    "t32": (32, 256, 4, 4),
}
CASES = {  # n, k, group, m, extra
    "even": (1280, 1024, 128, 256, ""),
    "odd": (1027, 1024, 128, 300, "zeros bias"),
    "g32": (770, 1088, 32, 130, "zeros"),
    "g64": (640, 960, 64, 129, "zeros"),
    "g256": (512, 2048, 256, 513, ""),
    "whole": (512, 1096, 1096, 200, "zeros"),
    "gated": (1402, 1024, 128, 257, "gated bias"),
}
BATCHES = (32, 64, 128, 256, 512, 1024, 2048)
LIMIT = 1e-3
LEAST = {"tall": 128, "long": 256, "small": 64, "t64": 64, "s64": 64, "t32": 32}
MOST = {"tall": 4096, "long": 4096, "small": 4096, "t64": 128, "s64": 128, "t32": 64}


SECONDS = float(os.environ.get("SECONDS_LEFT", 98))


def timed(make, weights):
    """Best time of a call, of a graph that has a call with each weight."""
    calls = [make(w) for w in weights]
    return microseconds(calls * math.ceil(CALLS / len(calls)))


def error(y, x, w):
    """Relative Frobenius error against float64."""
    wanted = x.double() @ w.double().T
    return float((y.double() - wanted).norm() / wanted.norm())


def draw(n, k, group, zeros, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda", generator=g)
    s = torch.rand(n, k // group, device="cuda", generator=g).mul_(0.01).add_(1e-3).half()
    z = torch.randint(0, 16, (n, k // group), dtype=torch.uint8, device="cuda", generator=g)
    return q, s, z if zeros else None


def check(name, case, dtype):
    """Errors of one form on one case, at its own share and at odd ones."""
    from batchery.kernels.w4a16_layout import dequantize_w4, pack_w4
    from batchery.kernels.w4a16_plan import stripes
    from batchery.kernels.w4a16_wide import Wide, fits, launch

    form = Wide(*FORMS[name])
    n, k, group, m, extra = CASES[case]
    gated = "gated" in extra
    weight = pack_w4(*draw(n, k, group, "zeros" in extra), gated=gated)
    w = dequantize_w4(weight, torch.float64)
    g = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(m, k, device="cuda", generator=g).to(dtype)
    bias = torch.randn(n, device="cuda", generator=g).to(dtype) if "bias" in extra else None
    wanted = x.double() @ w.T + (0 if bias is None else bias.double())
    if gated:
        wanted = F.silu(wanted[:, : n // 2]) * wanted[:, n // 2 :]
        bias = torch.stack(bias.chunk(2), 1).flatten()
    assert fits(x, weight)
    tiles = -(-weight.rows // form.rows) * -(-m // form.batch)
    errors, seconds = [], []
    usual = stripes(tiles, weight.words.shape[1], 132)[0]
    for share in (
        usual,
        (0, tiles, tiles),
        (0, tiles, 3 * tiles),
        (0, tiles, 2 * tiles - 1),
        (0, tiles, 3),
    ):
        if share[2] > tiles * weight.words.shape[1]:
            continue
        out = torch.full((m, n // 2 if gated else n), torch.nan, dtype=dtype, device="cuda")
        begin = time.perf_counter()
        launch(x, weight, form, share, bias=bias, out=out)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        errors.append(float((out.double() - wanted).norm() / wanted.norm()))
    same = launch(x, weight, form, usual, bias=bias)
    alike = all(torch.equal(launch(x, weight, form, usual, bias=bias), same) for _ in range(20))
    x[5, 9] = torch.nan
    y = launch(x, weight, form, usual, bias=bias)
    kept = torch.arange(m, device="cuda") != 5
    return {
        "errors": errors,
        "same bits": alike,
        "NaN stays": bool(y[5].isnan().all()) and torch.equal(y[kept], same[kept]),
        "counters": int(weight.counters.abs().sum()),
        "first s": seconds[0],
    }


def job(name, case, dtype, path):
    try:
        found = check(name, case, getattr(torch, dtype))
    except BaseException as problem:  # noqa: BLE001 - a variant that fails is a result
        found = {"failed": repr(problem)[:400], "trace": traceback.format_exc()[-1500:]}
    Path(path).write_text(json.dumps(found))


def check_all(processes=16, limit=55.0):
    """Run every check in a process of its own: one that hangs is ended."""
    jobs = [(f, c, "float16") for f in ("tall", "long", "small") for c in CASES]
    jobs += [(f, "odd", "bfloat16") for f in ("tall", "long", "small")]
    jobs += [(f, c, "float16") for f in ("t64", "s64", "t32") for c in ("even",)]
    jobs += [("t64", "odd", "float16")]
    context = multiprocessing.get_context("spawn")
    folder = tempfile.mkdtemp()
    waiting, running, found = list(enumerate(jobs)), [], {}
    jobs_by_path = {}
    while waiting or running:
        while waiting and len(running) < processes:
            at, (name, case, dtype) = waiting.pop(0)
            path = f"{folder}/{at}.json"
            jobs_by_path[path] = f"{name} {case} {dtype}"
            process = context.Process(target=job, args=(name, case, dtype, path))
            process.start()
            running.append((process, path, time.perf_counter()))
        time.sleep(0.05)
        for entry in list(running):
            process, path, begin = entry
            late = time.perf_counter() - begin > limit
            if process.is_alive() and not late:
                continue
            if process.is_alive():
                process.kill()
            process.join()
            running.remove(entry)
            done = Path(path).exists()
            found[jobs_by_path[path]] = (
                json.loads(Path(path).read_text()) if done else {"failed": "hangs or crashed"}
            )
    return found


def good(result, dtype):
    limit = LIMIT if dtype == "float16" else 4 * LIMIT
    return (
        "failed" not in result
        and max(result["errors"]) <= limit
        and result["same bits"]
        and result["NaN stays"]
        and result["counters"] == 0
    )


def ways(tiles, blocks, processors, many):
    from batchery.kernels.w4a16_plan import stripes

    given = stripes(tiles, blocks, processors)[0]
    found = [given]
    if tiles > processors // 2:
        found.append((0, tiles, tiles))  # a program for each tile
    if many and tiles * blocks >= processors:
        found.append((0, tiles, processors))
    if many and tiles < processors:
        parts = processors // tiles
        found += [(0, tiles, tiles * p) for p in {1, parts, max(1, parts // 2)} if p <= blocks]
    return list(dict.fromkeys(found))


def measure(shape, forms, found, device):
    from batchery.kernels.w4a16 import w4a16_matmul
    from batchery.kernels.w4a16_layout import dequantize_w4
    from batchery.kernels.w4a16_wide import Wide, launch

    n, k = SHAPES[shape]
    dense = [random(n, k) for _ in copies(2 * n * k)]
    rows = {}
    for m in BATCHES:
        x = random(m, k)
        rows[m] = {"shape": shape, "m": m, "forms": [], "failed": {}}
        rows[m]["cublas"] = timed(lambda w, x=x: functools.partial(F.linear, x, w), dense)
    del dense
    torch.cuda.empty_cache()
    first = packed(n, k)
    weights = [fresh(first) for _ in copies(first.nbytes)]
    few = torch.arange(0, n, max(1, n // 256), device=device)
    w = dequantize_w4(first, torch.float32)[few] if n * k < 2**28 else None
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    blocks = first.words.shape[1]
    for m in BATCHES:
        row = rows[m]
        x = random(m, k)
        row["chosen"] = timed(lambda v, x=x: functools.partial(w4a16_matmul, x, v), weights)
        for name in forms:
            if not LEAST[name] <= m <= MOST[name]:
                continue
            form = Wide(*FORMS[name])
            tiles = -(-first.rows // form.rows) * -(-m // form.batch)
            for share in ways(tiles, blocks, processors, m <= 256):
                try:
                    worst = None
                    if w is not None:
                        worst = error(launch(x, first, form, share)[:, few], x, w)
                    us = timed(
                        lambda v, x=x, form=form, share=share: functools.partial(
                            launch, x, v, form, share
                        ),
                        weights,
                    )
                    row["forms"].append([name, share, us, worst])
                except Exception as problem:  # noqa: BLE001
                    row["failed"][f"{name} {share}"] = repr(problem)[:300]
        found["layers"].append(row)


def report(found):
    for name, result in found["checks"].items():
        dtype = name.split()[-1]
        if not good(result, dtype):
            shown = {key: value for key, value in result.items() if key != "trace"}
            print("CHECK", name, json.dumps(shown)[:300])
            print(result.get("trace", "")[-500:])
    fine = sum(good(r, name.split()[-1]) for name, r in found["checks"].items())
    worst = max((max(r["errors"]) for r in found["checks"].values() if "errors" in r), default=None)
    print(f"checks: {fine} of {len(found['checks'])} good, worst error {worst}")
    for row in found["layers"]:
        for name, text in row["failed"].items():
            print("FAILED", row["shape"], row["m"], name, text[:200])
    worst = max(
        (e for row in found["layers"] for *_, e in row["forms"] if e is not None), default=None
    )
    print("worst error on the layers", worst)
    print(
        "layer         M  cublas  chosen | each form at its own share and, if faster, at its best"
    )
    for row in sorted(found["layers"], key=lambda r: (r["shape"], r["m"])):
        text = f"{row['shape']:12s} {row['m']:4d} {row['cublas']:7.1f} {row['chosen']:7.1f} |"
        for name in FORMS:
            mine = [entry for entry in row["forms"] if entry[0] == name]
            if mine:
                best = min(mine, key=lambda entry: entry[2])
                text += f" {name} {mine[0][2]:.1f}"
                if best[2] < 0.99 * mine[0][2]:
                    text += f" ({best[2]:.1f} {'/'.join(map(str, best[1]))})"
        if row["forms"]:
            best = min(entry[2] for entry in row["forms"])
            text += f" = {row['cublas'] / best:.2f}x"
        print(text)
    print("model    M  cublas TF/s  chosen | forms at their own share, best of all")
    for model in ("8B", "70B"):
        for m in BATCHES:
            rows = [
                r
                for r in found["layers"]
                if r["m"] == m and r["shape"].startswith(model + " ") and r["forms"]
            ]
            if not rows:
                continue
            base = sum(r["cublas"] for r in rows)
            flops = sum(2 * m * SHAPES[r["shape"]][0] * SHAPES[r["shape"]][1] for r in rows)
            text = f"{model:4s} {m:5d} {base:7.0f} {flops / base / 1e6:4.0f} "
            text += f"{base / sum(r['chosen'] for r in rows):7.2f} |"
            for name in FORMS:
                times = [next((e[2] for e in r["forms"] if e[0] == name), None) for r in rows]
                if None not in times:
                    text += f" {name} {base / sum(times):.2f}"
            best = sum(min(e[2] for e in r["forms"]) for r in rows)
            either = sum(min(r["chosen"], *(e[2] for e in r["forms"])) for r in rows)
            text += f" best {base / best:.2f} ({flops / best / 1e6:.0f} TF/s)"
            print(text + f" with chosen {base / either:.2f}")
    print(found["device"], "seconds", found["seconds"])


def main():
    begin = time.perf_counter()
    device = torch.device("cuda")
    found = {
        "checks": {},
        "layers": [],
        "seconds": {},
        "device": torch.cuda.get_device_name(device),
    }
    path = Path(os.environ.get("OUT", ".")) / "wide.json"

    def late():  # a kernel that hangs keeps the main thread in the driver
        print("ENDED BY THE WATCHDOG: a kernel hangs, or the time was too short")
        path.write_text(json.dumps(found, indent=1) + "\n")
        report(found)
        sys.stdout.flush()
        os._exit(3)

    watchdog = threading.Timer(SECONDS, late)
    watchdog.daemon = True
    watchdog.start()
    try:
        found["checks"] = check_all()
        found["seconds"]["checks"] = round(time.perf_counter() - begin)
        even = {name: found["checks"][f"{name} even float16"] for name in FORMS}
        forms = [name for name in FORMS if good(even[name], "float16")]
        for shape in SHAPES:
            if time.perf_counter() - begin > 0.85 * SECONDS:
                print("no time left for", shape)
                continue
            measure(shape, forms, found, device)
            torch.cuda.empty_cache()
            found["seconds"][shape] = round(time.perf_counter() - begin)
    except Exception:  # noqa: BLE001 - what was found so far is reported
        traceback.print_exc()
    watchdog.cancel()
    path.write_text(json.dumps(found, indent=1) + "\n")
    report(found)


if __name__ == "__main__":
    main()
