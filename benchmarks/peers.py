"""The peers. Those that are not installed are skipped, with a line that says so."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peewee
import pykka


def missing(module: str) -> str | None:
    """Why a peer cannot be measured, or None."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # not even what it is part of
        found = None
    return None if found else f"{module} is not installed (pip install 'understudy[bench]')"


# --- stock pykka and peewee: dependencies of ours, always there ---------------------------------


class StockActor(pykka.ThreadingActor):
    """A thread, an inbox, and an answer."""

    use_daemon_thread = True

    def on_receive(self, message: Any) -> Any:
        return message


def _row_model(database: peewee.Database) -> type[peewee.Model]:
    class Prompt(peewee.Model):
        session_id = peewee.TextField()
        text = peewee.TextField()

        class Meta:
            table_name = "prompt"

    Prompt.bind(database)
    database.create_tables([Prompt])
    return Prompt


class StockStoring(pykka.ThreadingActor):
    """Writes one row for each prompt, as the tutorials do."""

    use_daemon_thread = True

    def __init__(self, model: type[peewee.Model]) -> None:
        super().__init__()
        self._model = model

    def on_receive(self, message: Any) -> Any:
        return self._model.create(session_id=self.actor_urn, text=message).id


def stock_prompts(path: Path, *, actors: int, prompts: int, window: int) -> float:
    """Prompts per second of thread actors that write one row each, autocommitted at FULL."""
    database = peewee.SqliteDatabase(
        str(path), pragmas={"journal_mode": "wal", "synchronous": 2, "busy_timeout": 60_000}
    )
    model = _row_model(database)
    refs = [StockStoring.start(model) for _ in range(actors)]
    start = time.perf_counter()
    waiting: list[Any] = []
    for number in range(prompts):
        waiting.append(refs[number % actors].ask("What is 1 + 2?", block=False))
        if len(waiting) >= window:
            waiting.pop(0).get()
    for future in waiting:
        future.get()
    figure = prompts / (time.perf_counter() - start)
    for ref in refs:
        ref.stop(block=False)
    return figure


# --- DBOS --------------------------------------------------------------------------------------


class Dbos:
    """A durable workflow of three steps on SQLite."""

    def __init__(self, path: Path) -> None:
        os.environ.setdefault("DBOS__DISABLE_TELEMETRY", "1")
        import logging

        from dbos import DBOS

        self._dbos = DBOS
        DBOS(
            config={
                "name": "bench",
                "system_database_url": f"sqlite:///{path}",
                "log_level": "CRITICAL",
                "run_admin_server": False,
                "enable_otlp": False,
            }
        )
        logging.getLogger("dbos").setLevel(logging.CRITICAL)

        @DBOS.step()
        def step(number: int) -> int:
            return number + 1

        @DBOS.workflow()
        def workflow(number: int) -> int:
            return step(step(step(number)))

        self._workflow = workflow
        DBOS.launch()

    def rate(self, runs: int) -> float:
        """Workflows per second with 64 under way."""
        start = time.perf_counter()
        waiting: deque[Any] = deque()
        for number in range(runs):
            waiting.append(self._dbos.start_workflow(self._workflow, number))
            if len(waiting) >= 64:
                waiting.popleft().get_result()
        for handle in waiting:
            handle.get_result()
        return runs / (time.perf_counter() - start)

    def close(self) -> None:
        self._dbos.destroy()


# --- LangGraph ---------------------------------------------------------------------------------


class LangGraph:
    """A graph of three nodes with the SQLite checkpointer."""

    def __init__(self, path: Path) -> None:
        from typing import TypedDict

        from langgraph.checkpoint.sqlite import SqliteSaver
        from langgraph.graph import END, START, StateGraph

        State = TypedDict("State", {"n": int})  # noqa: UP013 - its annotations are read at run time

        def node(state: Any) -> Any:
            return {"n": state["n"] + 1}

        connection = sqlite3.connect(path, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
        connection.execute("PRAGMA synchronous = FULL")
        builder = StateGraph(State)
        for name in ("a", "b", "c"):
            builder.add_node(name, node)
        builder.add_edge(START, "a")
        builder.add_edge("a", "b")
        builder.add_edge("b", "c")
        builder.add_edge("c", END)
        self._graph = builder.compile(checkpointer=SqliteSaver(connection))
        self._threads = 0

    def rate(self, runs: int) -> float:
        """Runs per second, one after the other: its connection takes one at a time."""
        start = time.perf_counter()
        for _ in range(runs):
            self._threads += 1
            self._graph.invoke({"n": 0}, {"configurable": {"thread_id": str(self._threads)}})
        return runs / (time.perf_counter() - start)

    def close(self) -> None:
        pass


# --- OpenAI Agents SDK -------------------------------------------------------------------------


def agents_items(path: Path, items: int) -> float:
    """Items per second that its SQLite session keeps, a prompt and an answer at a time."""
    from agents import SQLiteSession

    session = SQLiteSession("bench", str(path))

    async def add() -> None:
        for _ in range(items // 2):
            await session.add_items(
                [
                    {"role": "user", "content": "What is 1 + 2?"},
                    {"role": "assistant", "content": "It is 3."},
                ]
            )

    start = time.perf_counter()
    asyncio.run(add())
    return items / (time.perf_counter() - start)


def try_peer(module: str, make: Callable[[], Any]) -> tuple[Any, str | None]:
    """The peer, or why there is none: not installed, or it does not start here."""
    why = missing(module)
    if why is not None:
        return None, why
    try:
        return make(), None
    except Exception as error:  # noqa: BLE001 - whatever a peer does, the rest is measured
        return None, f"{module} does not start: {type(error).__name__}: {error}"
