"""The chain of graph/benches/workloads/chain.rs, told to LangGraph: 20 nodes that add one and append 64 bytes, every superstep
written before the next one starts. Prints {"rate": supersteps a second, "version": LangGraph's}.

usage: langgraph_chain.py THREADS SECONDS (the database is DATABASE_URL)
"""

import asyncio
import importlib.metadata
import itertools
import json
import operator
import os
import sys
import time
import uuid
from typing import Annotated, TypedDict

import uvloop
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.graph import END, START, StateGraph
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

NODES = 20
BYTES = 64
# More connections than these do not make it faster.
CONNECTIONS = 16


class Chain(TypedDict):
    n: int
    log: Annotated[list, operator.add]


async def add(chain: Chain):
    return {"n": chain["n"] + 1, "log": ["x" * BYTES]}


def graph(saver):
    builder = StateGraph(Chain)
    names = [f"n{index:02}" for index in range(NODES)]
    for name in names:
        builder.add_node(name, add)
    for before, after in itertools.pairwise([START, *names, END]):
        builder.add_edge(before, after)
    return builder.compile(checkpointer=saver)


async def run_one(chains):
    config = {"configurable": {"thread_id": str(uuid.uuid4())}}
    end = await chains.ainvoke({"n": 0, "log": []}, config, durability="sync")
    if end["n"] != NODES or len(end["log"]) != NODES:
        raise RuntimeError(f"a chain ended with n = {end['n']} and {len(end['log'])} lines")


async def rate(chains, threads, seconds):
    """Supersteps a second, with so many threads at a time: as soon as one ends the next one is started."""
    begun = time.perf_counter()

    async def driver():
        ended = 0
        while time.perf_counter() - begun < seconds:
            await run_one(chains)
            ended += 1
        return ended

    ended = await asyncio.gather(*(driver() for _ in range(threads)))
    return sum(ended) * NODES / (time.perf_counter() - begun)


async def main(threads, seconds):
    size = min(threads, CONNECTIONS)
    settings = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
    async with AsyncConnectionPool(os.environ["DATABASE_URL"], min_size=size, max_size=size, kwargs=settings, open=False) as pool:
        saver = AsyncPostgresSaver(pool)
        await saver.setup()
        chains = graph(saver)
        await run_one(chains)
        steps = await rate(chains, threads, seconds)
    print(json.dumps({"rate": steps, "version": importlib.metadata.version("langgraph")}))


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), float(sys.argv[2])))
