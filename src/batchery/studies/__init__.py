# SPDX-License-Identifier: Apache-2.0
"""One file per system: the published claim against its true baseline, on real data.

`study.py` says what a study is, `harness.py` runs one, `report.py` shows the results. What several
studies train is in `char.py` (a perceptron on characters) and `lab.py` with `lab_text.py`,
`lab_loop.py` and `lab_cache.py` (the lab's language model); `graphs.py` makes its steps short on
CUDA. Every other file is the study of the slug that names it and holds one `STUDY`;
`wind_tunnel.py` is a part of that of `wsd`.
"""
