"""One of several processes that merge together: the program that `test_processes.py` starts.

Its answers go to files, because the libraries write to the streams what they like.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxmerge as jm

EXPERTS = {"a": "models/a", "b": "models/b"}
TIES = jm.chain(jm.trim(0.3), jm.elect_sign(zero="majority"), jm.disjoint_mean())

CALLS: dict[str, tuple[jm.Method, dict[str, Any]]] = {
    # An order statistic and a sum over the model; chunks of which several make up a block that is hashed.
    "ties": (TIES, {"format": "orbax"}),
    "tensor": (jm.ties(0.3, scope="tensor"), {"max_shard_bytes": "3MB"}),
    "dare.safetensors": (jm.dare(0.5), {"key": 1}),
    "within": (TIES, {"io_budget": "50%", "catalog": "catalog"}),
    "again": (TIES, {"format": "orbax", "reuse": "ties"}),
    # The other model differs in one entry.
    "before": (jm.linear(), {"io_budget": "100%", "catalog": "catalog", "experts": EXPERTS | {"a": "models/moved"}}),
    "blocks": (jm.linear(), {"catalog": "catalog", "reuse": "before"}),
}

LAST: dict[str, Any] = {"method": jm.linear(), "overwrite": True}

RECIPE = """
method: task_arithmetic
parameters: {scale: 0.3}
base: models/base
experts: {a: models/a, b: models/b}
"""


def merge(name: str, out: str | None = None, **changes: Any) -> Any:
    """A call of the table, or another one like it."""
    method, options = CALLS[name]
    given = {"base": "models/base", "memory_budget": "16MiB", "progress": False} | options | changes
    return jm.merge_checkpoint(given.pop("method", method), given.pop("experts", EXPERTS), out=out or name, **given)


def answer(work: Callable[[], Any]) -> Any:
    """What comes of it, as plain data."""
    try:
        report = work()
    except jm.MergeError as error:
        return [type(error).__name__, str(error)]
    if not hasattr(report, "bytes_read"):
        return report
    names = ("bytes_read", "bytes_written", "reused", "reused_blocks", "processes", "workers")
    told = {name: getattr(report, name) for name in names}
    planned = None if report.io_plan is None else dict(report.io_plan.planned)
    return told | {"path": str(report.path), "planned": planned}


def printed(arguments: list[str]) -> str:
    """What the command line prints."""
    from jaxmerge.cli.main import main

    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        main(arguments)
    return stream.getvalue()


@contextlib.contextmanager
def changed(owner: Any, name: str, value: Any):
    former = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, former)


def broken(*_: Any) -> None:
    raise jm.CheckpointError("cannot write out: the disk is full")


def all_answers(index: int, begin: list[str]) -> dict[str, Any]:
    """Merges that succeed, and merges that fail, one after the other in one session of `jax.distributed`.

    More than two processes do some of them.
    """
    from examples.cluster.merge import main as example
    from jaxmerge.checkpoints.publish import Staging
    from jaxmerge.streaming import processes

    def differs() -> Any:
        return merge("ties", "never", method=jm.ties(0.4 if index else 0.3))

    def missing() -> Any:
        return merge("ties", "never", experts={"a": "models/a", "b": "models/nowhere" if index else "models/b"})

    def nan() -> Any:
        experts = EXPERTS | {"c": "models/nan"}
        return merge("ties", "ties", method=jm.linear(), experts=experts, overwrite=True)

    def elsewhere() -> Any:
        with changed(processes, "TOKEN", f"token-{index}"), changed(processes, "FOLDER_SECONDS", 0.1):
            return merge("dare.safetensors", "never")

    def unpublished() -> Any:
        with changed(Staging, "commit", broken):
            return merge("dare.safetensors", overwrite=True)

    def bug() -> Any:
        try:
            merge("dare.safetensors", "never", key="no key" if index else 1)
        except jm.MergeError as error:
            return str(error)
        except Exception as error:
            return type(error).__name__

    def one_calls() -> Any:
        over = Path("one-called")
        while index and not over.exists():  # what this process calls next is another call
            time.sleep(0.05)
        with changed(processes, "JOIN_SECONDS", 1.0):
            result = None if index else answer(lambda: merge("dare.safetensors", "never"))
        over.touch()
        return result

    def lazily() -> Any:
        with contextlib.ExitStack() as opened:
            models = {name: opened.enter_context(jm.open_checkpoint(f"models/{name}")) for name in ("base", *EXPERTS)}
            params = {name: model.params for name, model in models.items()}
            base = params.pop("base")
            return jm.save_lazily(jm.merge(TIES, params, base=base), "lazily", memory_budget="16MiB", progress=False)

    steps: dict[str, Callable[[], Any]] = {"example": lambda: example(["recipe.yml", "--out", "example", *begin])}
    steps |= {name: functools.partial(merge, name) for name in CALLS}
    steps |= {"differs": differs, "missing": missing, "nan": nan, "elsewhere": elsewhere, "unpublished": unpublished}
    steps["bug"] = bug
    steps["url"] = lambda: merge("tensor", "memory://bucket/never")
    store = ["--store", "models", "--name", "x"]
    steps["store"] = lambda: printed(["merge", "recipe.yml", *store, "--distributed", "--traceback"])
    steps["own"] = lambda: merge("dare.safetensors", f"own-{index}.safetensors", processes="own")
    steps["command"] = lambda: printed(["merge", "recipe.yml", "--out", "command", "--distributed", "--traceback"])
    steps["one calls"] = one_calls
    steps["lazily"] = lazily  # all can work together again
    import jax

    first = {"example": answer(steps.pop("example"))}  # which brings the processes together
    if jax.process_count() > 2:
        steps = {name: steps[name] for name in ("ties", "nan", "command")}
    return first | {name: answer(step) for name, step in steps.items()}


def killed(index: int, begin: list[str], guilty: int) -> dict[str, Any]:
    """A merge in which one process is killed as it writes."""
    import jax

    from jaxmerge.checkpoints.writer import CheckpointWriter
    from jaxmerge.streaming import processes

    write = CheckpointWriter.write

    def dying(*arguments: Any) -> bool:
        os.kill(os.getpid(), signal.SIGKILL)
        return write(*arguments)

    jax.distributed.initialize(begin[1], int(begin[3]), index)
    processes.SILENCE_SECONDS = 3.0
    with changed(CheckpointWriter, "write", dying if index == guilty else write):
        return {"killed": answer(lambda: merge("tensor", "old", **LAST))}


if __name__ == "__main__":
    number, victim, start = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    told = all_answers(number, start) if victim < 0 else killed(number, start, victim)
    Path(f"answer-{number}.json").write_text(json.dumps(told))
    if victim >= 0:
        os._exit(0)  # JAX would wait for the process that was killed
