# SPDX-License-Identifier: Apache-2.0
"""Runs of `batchery release`, and what they have said."""

import json

from batchery import cli
from batchery.privacy import Ledger

EXACT = ["--rho", "1e6"]  # the discrete noise of this budget is 0 but for one draw in 10^1000
CITIES = ["rome", "oslo", "bern"]


COUNT = ["--count", "--columns", "city", "--values", "rome,oslo,bern"]
SUM = ["--sum", "--columns", "amount,bit", "--range=-5,20"]


def csv_of(rows):
    body = "".join(f'"{row["city"]}",{row["bit"]},{row["amount"]}\n' for row in rows)
    return "city,bit,amount\n" + body


def release(*arguments, ledger="l.db"):
    return cli.main(["release", *map(str, arguments), "--ledger", ledger])


def published(text):
    return [json.loads(line) for line in text.splitlines()]


def values(text):
    return [line["value"] for line in published(text)]


def positions(ledger="l.db"):
    with Ledger(ledger) as opened:
        return [account.t for account in opened.accounts()]


def one_line(text):
    *_, last = text.strip().splitlines()
    assert last.startswith("batchery release: ")
    return last
