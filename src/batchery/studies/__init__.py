# SPDX-License-Identifier: Apache-2.0
"""One file per system: the published claim against its true baseline, on real data.

`study.py` says what a study is, `harness.py` runs one, `report.py` shows the results. Every other
file but `lab.py` (the small language model several studies share) is the study of the slug that
names it and holds one `STUDY`.
"""
