"""LangGraph's own bench shapes, in memory; graph/benches/workloads/shapes.rs tells them in this engine's terms.

Prints {shape: {"alone": [ms, …], "saved": [ms, …]}}: without a checkpointer, and with LangGraph's memory saver, which writes once, at the
end. Both are called in the synchronous way, which is LangGraph's faster one here.

usage: langgraph_shapes.py RUNS
"""

import dataclasses
import json
import operator
import random
import string
import sys
import time
import uuid
from functools import partial
from typing import Annotated, TypedDict

from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Send

SEQUENTIAL = 1000
SUBJECTS = 100
BUMPS = 10
ENDLESS = 1_000_000_000


def letters(count):
    return "".join(random.choices(string.ascii_lowercase, k=count))


def sequential():
    """A long chain of nodes that do nothing."""

    def nothing(_state: MessagesState):
        return None

    builder = StateGraph(MessagesState)
    before = START
    for index in range(SEQUENTIAL):
        builder.add_node(f"node_{index}", nothing)
        builder.add_edge(before, f"node_{index}")
        before = f"node_{index}"
    builder.add_edge(before, END)
    return builder


class Joke(TypedDict):
    subject: str
    jokes: list[str]


class JokeInput(TypedDict):
    subject: str


class JokeOutput(TypedDict):
    jokes: list[str]


class Show(TypedDict):
    subjects: list[str]
    jokes: Annotated[list[str], operator.add]


def fan_out():
    """A task for each subject, each of which runs a graph of its own: twelve steps."""
    joke = StateGraph(Joke, input_schema=JokeInput, output_schema=JokeOutput)
    joke.add_node("edit", lambda state: {"subject": f"{state['subject']} - hohoho"})
    joke.add_node("generate", lambda state: {"jokes": [f"Joke about {state['subject']}"]})
    joke.add_node("bump", lambda state: {"jokes": [state["jokes"][0] + " a"]})
    joke.add_edge(START, "edit")
    joke.add_edge("edit", "generate")
    joke.add_edge("generate", "bump")
    joke.add_conditional_edges("bump", lambda state: END if state["jokes"][0].endswith(" a" * BUMPS) else "bump", ["bump", END])
    show = StateGraph(Show)
    show.add_node("generate_joke", joke.compile())
    show.add_conditional_edges(START, lambda state: [Send("generate_joke", {"subject": subject}) for subject in state["subjects"]], ["generate_joke"])
    show.add_edge("generate_joke", END)
    return show


def or_as_it_was(value, update):
    return update if update is not None else value


def or_value(value, update):
    return update or value


def newest(_value, update):
    return update


@dataclasses.dataclass(kw_only=True)
class Wide:
    messages: Annotated[list, operator.add] = dataclasses.field(default_factory=list)
    trigger_events: Annotated[list, operator.add] = dataclasses.field(default_factory=list)
    primary_issue_medium: Annotated[str, or_value] = "email"
    autoresponse: Annotated[dict | None, newest] = None
    issue: Annotated[dict | None, or_value] = None
    relevant_rules: list | None = None
    memory_docs: list | None = None
    categorizations: Annotated[list, operator.add] = dataclasses.field(default_factory=list)
    responses: Annotated[list, operator.add] = dataclasses.field(default_factory=list)
    user_info: Annotated[dict | None, or_as_it_was] = None
    crm_info: Annotated[dict | None, or_as_it_was] = None
    email_thread_id: Annotated[str | None, or_as_it_was] = None
    slack_participants: Annotated[dict, operator.or_] = dataclasses.field(default_factory=dict)
    bot_id: str | None = None
    notified_assignees: Annotated[dict, operator.or_] = dataclasses.field(default_factory=dict)


def wide(limit):
    """A loop over a wide state whose lists grow, until there are more than so many messages."""

    def one(state):
        return {"trigger_events": state.messages, "primary_issue_medium": letters(limit)}

    def two(state):
        return {"autoresponse": state.trigger_events[-1], "issue": state.trigger_events[-1]}

    def three(state):
        return {"relevant_rules": [state.autoresponse]}

    def four(state):
        return dict.fromkeys(("categorizations", "responses", "memory_docs"), state.trigger_events)

    def five(state):
        last = dict.fromkeys(("user_info", "crm_info", "slack_participants", "notified_assignees"), state.categorizations[-1])
        return last | {"email_thread_id": letters(limit), "bot_id": letters(limit)}

    def six(state):
        return {"messages": state.responses}

    builder = StateGraph(Wide)
    for node in (one, two, three, four, five, six):
        builder.add_node(node.__name__, node)
    builder.add_edge(START, "one")
    builder.add_edge("one", "two")
    builder.add_edge("two", "three")
    builder.add_edge("two", "four")
    builder.add_edge(["three", "four"], "five")
    builder.add_edge("five", "six")
    builder.add_conditional_edges("six", lambda state: END if len(state.messages) > limit else "one", ["one", END])
    return builder


def message(entries, parts):
    part = {str(index) * 10: ["hi?" * 10, True, 1, 6327816386138, None] * 5 for index in range(parts)}
    return {str(index) * 10: part for index in range(entries)}


def timed(work):
    begun = time.perf_counter()
    work()
    return (time.perf_counter() - begun) * 1000


def runs(builder, saver, data, count):
    graph = builder.compile(checkpointer=saver)
    took = []
    for _ in range(count + 1):
        config = {"configurable": {"thread_id": str(uuid.uuid4())}, "recursion_limit": ENDLESS}
        durability = {"durability": "exit"} if saver else {}
        took.append(timed(partial(graph.invoke, data, config, **durability)))
    # The first run is warming up.
    return took[1:]


def main(count):
    shapes = {
        "sequential_1000": (sequential(), {"messages": []}),
        "fan_out_to_subgraph_100": (fan_out(), {"subjects": [letters(1000) for _ in range(SUBJECTS)]}),
        "wide_state_25x300": (wide(300), {"messages": [message(5, 5)]}),
        "wide_state_9x1200": (wide(1200), {"messages": [message(3, 3)]}),
    }
    took = {
        name: {"alone": runs(builder, None, data, count), "saved": runs(builder, InMemorySaver(), data, count)}
        for name, (builder, data) in shapes.items()
    }
    compiling = [timed(sequential().compile) for _ in range(count)]
    took["compile_sequential_1000"] = {"alone": compiling}
    print(json.dumps(took))


if __name__ == "__main__":
    main(int(sys.argv[1]))
