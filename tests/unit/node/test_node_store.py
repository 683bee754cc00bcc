"""The store that ranks meet through, over real pipes, with real PyTorch RPC and gloo on it."""

from __future__ import annotations

import asyncio

from node_ranks import WAIT_S, Witness, launch_of, met

from tensorway_worker.rank_process import RankProcess


async def ended(witness: Witness, ranks: list[RankProcess]) -> None:
    """Returns once all have ended well."""
    async with asyncio.timeout(WAIT_S):
        while len(witness.exits) < len(ranks):
            witness.news.clear()
            await witness.news.wait()
    assert set(witness.exits.values()) == {0}, witness.lines


async def test_rpc_and_gloo_meet_through_the_node() -> None:
    witness = Witness()
    async with met(witness, [launch_of(rank, 3, "meet") for rank in range(3)]) as ranks:
        await ended(witness, ranks)
    for rank in range(3):
        # torch's own warnings may stand on the same lines.
        said = "\n".join(line for one, line in witness.lines if one == rank)
        assert f"rpc {rank + 1.0}" in said
        assert "sum 3.0" in said
    assert witness.num_operations > 10


async def test_every_operation_means_what_torch_means() -> None:
    witness = Witness()
    async with met(witness, [launch_of(0, 1, "operate")]) as ranks:
        await ended(witness, ranks)
    said = [line for _, line in witness.lines]
    assert said[0] == "all operations are right"
    assert said[1] == "refused: waited 0.2 s in vain for a, b"
    assert said[2] == "refused: waited 0.2 s in vain for p/never"
    assert said[3].startswith("refused: set of huge: ")


async def test_the_end_of_an_epoch_ends_what_waits() -> None:
    witness = Witness()
    async with met(witness, [launch_of(0, 1, "hang")]) as ranks:
        await witness.until_printed(0, "waiting")
        while not witness.meeting.num_waiting:
            await asyncio.sleep(0.01)
        witness.meeting.end("the epoch is over")
        await ended(witness, ranks)
    assert (0, "ended: the epoch is over") in witness.lines


async def test_a_node_that_goes_ends_what_waits() -> None:
    witness = Witness()
    async with met(witness, [launch_of(0, 1, "hang")]) as ranks:
        await witness.until_printed(0, "waiting")
        assert ranks[0].process.stdin is not None
        ranks[0].process.stdin.close()
        await ended(witness, ranks)
    assert (0, "ended: the node has gone") in witness.lines


async def test_no_operation_of_many_threads_is_lost() -> None:
    witness = Witness()
    async with met(witness, [launch_of(rank, 2, "crowd") for rank in range(2)]) as ranks:
        await ended(witness, ranks)
    assert witness.num_operations == 2 * (4 * 50 * 3 + 1)
    assert {line for _, line in witness.lines if line.startswith("count")} & {"count 400"}
