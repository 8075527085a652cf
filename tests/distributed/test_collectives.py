"""What ranks share: rows, results and errors, on two real processes and on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from interp_rlhf.distributed import World, agree, barrier, gather_rows, join_world, run_on_main, share

WORKER = Path(__file__).with_name("collectives_worker.py")


pytestmark = pytest.mark.xdist_group("collectives")  # one worker, so that it is built once


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(WORKER)]
    environment = {**os.environ, "PYTHONPATH": str(WORKER.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_rows_are_shared_evenly_and_come_back_in_order(ranks: list[dict[str, Any]]) -> None:
    assert [rank["world"] for rank in ranks] == [[0, 2, True], [1, 2, False]]
    rows = torch.arange(14.0).reshape(7, 2).tolist()
    for n in ("1", "2", "6", "7"):
        shares = [rank["shares"][n] for rank in ranks]
        assert len(shares[0]) == len(shares[1]) and set(shares[0] + shares[1]) == set(range(int(n)))
        assert all(rank["gathered"][n] == rows[: int(n)] for rank in ranks)


def test_features_of_all_ranks_reach_every_rank(ranks: list[dict[str, Any]]) -> None:
    rows = torch.arange(14.0).reshape(7, 2)
    for n in (1, 2, 7):
        texts = rows[:n]
        expected = [(2 * texts).tolist(), float(texts.square().sum()), int((texts != 0).sum())]
        assert [rank["features"][str(n)] for rank in ranks] == [expected] * 2
    message = "rank 1: MeasurementError: dictionary 'doubling': expected finite codes, found NaN or infinity"
    assert [rank["features failed"] for rank in ranks] == [message] * 2


def test_every_rank_learns_of_every_error(ranks: list[dict[str, Any]]) -> None:
    assert [rank["agreed"] for rank in ranks] == ["fine: 0", "fine: 1"]
    assert [rank["one failed"] for rank in ranks] == ["rank 1: ValueError: broken"] * 2
    assert [rank["both failed"] for rank in ranks] == ["rank 0: KeyError: 0; rank 1: KeyError: 1"] * 2


def test_what_the_main_process_did_reaches_every_rank(ranks: list[dict[str, Any]]) -> None:
    assert [rank["from main"] for rank in ranks] == ["fine: 10"] * 2
    expected = "rank 0: ZeroDivisionError: integer division or modulo by zero"
    assert [rank["main failed"] for rank in ranks] == [expected] * 2


def test_alone_nothing_is_sent_and_errors_stay_what_they_are() -> None:
    world = join_world()
    assert world == World() and world.is_main and share(5, world) == [0, 1, 2, 3, 4]
    assert gather_rows(torch.arange(3), 3, world).tolist() == [0, 1, 2]
    assert agree(3, world) == run_on_main(lambda: 3, world) == 3
    barrier(world)
    with pytest.raises(ValueError, match="broken"):
        agree(ValueError("broken"), world)
    with pytest.raises(ZeroDivisionError):
        run_on_main(lambda: 1 // 0, world)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_shares_cover_everything_once_before_padding(n: int, size: int) -> None:
    shares = [share(n, World(rank, size)) for rank in range(size)]
    assert {len(rows) for rows in shares} == {-(-n // size)}
    assert [index for place in zip(*shares, strict=True) for index in place][:n] == list(range(n))
