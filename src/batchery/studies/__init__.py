# SPDX-License-Identifier: Apache-2.0
"""One file per system: the published claim against its true baseline, on real data.

`study.py` says what a study is, `harness.py` runs one, `records.py` keeps its runs, `report.py`
shows the results; `tuning.py` finds learning rates. What several studies train is in `char.py` (a
perceptron on characters) and `lab.py` with `lab_text.py`, `lab_loop.py` and `lab_cache.py` (the
lab's language model); `graphs.py` makes its steps short on CUDA. Every other file is the study of
the slug that names it and holds one `STUDY`, or a part of one: `wind_tunnel.py` of that of `wsd`,
`encoder.py` of that of `marlin`, `hard_batches_tasks.py` and `dp_continual_streams.py` of theirs.
"""
