"""The `jaxmerge` command: arguments in, one function of the library called, its result printed.

`--help` must answer at once, so nothing but the standard library is imported before a command runs. Hence argparse, and
not tyro, whose import alone takes longer than all of this.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmerge.errors import MergeError

if TYPE_CHECKING:
    from jaxmerge.cli.comparing import Difference
    from jaxmerge.streaming.report import StreamReport


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; the exit code is 0, 1 after an error of the library, 2 for wrong usage.

    Args:
        arguments: what follows the command's name; by default what the process was started with.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except MergeError as error:
        if options.traceback:
            raise
        from jaxmerge.cli.output import print_error

        print_error(str(error))
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxmerge", description="Merge checkpoints, and look at them.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    merge = _command(commands, _merge, "merge", "merge checkpoints as a recipe says")
    merge.add_argument("recipe", metavar="RECIPE", help="YAML file, in our form or in mergekit's")
    place = merge.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", metavar="DIR", help="folder to write, or s3:// or gs:// URL; it appears when complete")
    place.add_argument(
        "--store", metavar="ROOT", help="model store, folder or URL, to write a new version to; needs --name"
    )
    merge.add_argument("--name", metavar="NAME", help="model in the store")
    merge.add_argument("--expected", metavar="COMMIT", help="the version that must be current in the store, or none")
    merge.add_argument("--memory-budget", metavar="SIZE", help="memory for the work, such as 1GiB")
    _add_io_options(merge)
    merge.add_argument("--plan", metavar="FILE.json", help="an access plan, instead of --io-budget")
    merge.add_argument("--seed", metavar="N", type=int, help="seed for methods that draw (the recipe's, or 0)")
    merge.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    merge.add_argument("--reuse", metavar="DIR", help="earlier output; tensors that would be the same are copied")
    merge.add_argument("--dry-run", action="store_true", help="check recipe and checkpoints, merge nothing")
    merge.add_argument(
        "--distributed",
        action=argparse.BooleanOptionalAction,
        help="share the work between all processes of a job (Slurm, Open MPI, TPU pod); or merge in each by itself",
    )

    plan = _command(commands, _plan, "plan", "show what a merge within an I/O budget would read, and its error bound")
    plan.add_argument("recipe", metavar="RECIPE", help="YAML file, in our form or in mergekit's")
    _add_io_options(plan)
    plan.add_argument("--save", metavar="FILE.json", help="write the plan to a file")
    plan.add_argument("--mesh", metavar="AXES", help="tell the cost on a mesh instead, such as data=16,model=8")
    plan.add_argument("--processes", metavar="N", type=int, default=1, help="with --mesh: that share the reading")
    plan.add_argument("--explain", metavar=("EXPERT", "TENSOR", "BLOCK"), nargs=3, help="why a block is read, or not")

    catalog = _command(commands, None, "catalog", "keep statistics of models, so that merges can be planned")
    actions = catalog.add_subparsers(title="actions", required=True, metavar="ACTION")
    for name, text in (
        ("add", "gather statistics of experts, relative to their base"),
        ("list", "list the models, and whether they are as they were"),
        ("verify", "check the catalog and its models; exit code 1 if any is missing or has changed"),
        ("gc", "forget models that are missing or have changed"),
    ):
        action = _command(actions, _catalog, name, text)
        action.set_defaults(action=name)
        action.add_argument("catalog", metavar="CATALOG", help="file; it is made if it does not exist")
        if name == "add":
            action.add_argument("base", metavar="BASE", help="folder, file or URL")
            action.add_argument("experts", metavar="EXPERT", nargs="+", help="folders, files or URLs")
            action.add_argument("--block", metavar="SIZE", help="size of a block, such as 1MiB")
        if name == "list":
            action.add_argument("--json", action="store_true", help="print JSON")

    store = _command(commands, None, "store", "look after a model store: models with versions")
    actions = store.add_subparsers(title="actions", required=True, metavar="ACTION")
    for name, text in (
        ("list", "list the models"),
        ("versions", "list the versions of a model"),
        ("path", "print the folder or URL of a version"),
        ("verify", "check that versions hold what was committed; exit code 1 if not"),
        ("gc", "remove old versions; the current ones stay"),
        ("recover", "finish or remove what killed writers have left"),
    ):
        action = _command(actions, _store, name, text)
        action.set_defaults(action=name)
        action.add_argument("root", metavar="ROOT", help="folder of the store, or s3:// or gs:// URL")
        if name in ("versions", "path", "verify"):
            action.add_argument("name", metavar="NAME", nargs="?" if name == "verify" else None, help="model")
        if name in ("path", "verify"):
            action.add_argument("commit", metavar="COMMIT", nargs="?", help="version, or the first digits of it")
        if name in ("list", "versions"):
            action.add_argument("--json", action="store_true", help="print JSON")
        if name == "gc":
            action.add_argument(
                "--keep", metavar="N", type=int, default=1, help="newest versions of each that stay (1)"
            )
            action.add_argument("--parents", action="store_true", help="what kept versions were made from stays too")
            action.add_argument("--dry-run", action="store_true", help="remove nothing")

    verify = _command(
        commands, _verify, "verify", "check that a merged folder holds what was written; exit code 1 if not"
    )
    verify.add_argument("folder", metavar="DIR", help="folder that a merge has written")

    explain = _command(commands, _explain, "explain", "tell what a merged folder was made from")
    explain.add_argument("folder", metavar="DIR", help="folder that a merge has written, or its jaxmerge.json")
    explain.add_argument("--tensor", metavar="NAME", help="tell it of one tensor")

    replay = _command(commands, _replay, "replay", "merge again as a manifest says; exit code 1 if the bytes differ")
    replay.add_argument("manifest", metavar="MANIFEST", help="jaxmerge.json of a merged folder, or that folder")
    replay.add_argument("--out", metavar="DIR", required=True, help="folder to write; it appears when it is complete")
    replay.add_argument("--catalog", metavar="FILE", help="catalog with statistics, for merges within an I/O budget")
    replay.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")

    inspect = _command(commands, _inspect, "inspect", "list the tensors of a checkpoint")
    inspect.add_argument("checkpoint", metavar="CKPT", help="folder, file or URL")
    inspect.add_argument("--json", action="store_true", help="print JSON")

    diff = _command(commands, _diff, "diff", "compare experts with their base: norms, cosines, sparsity per layer")
    diff.add_argument("base", metavar="BASE", help="folder, file or URL")
    diff.add_argument("experts", metavar="EXPERT", nargs="+", help="folders, files or URLs")
    diff.add_argument("--plot", metavar="FILE.png", help="also draw the cosines per layer (extra 'plot')")
    diff.add_argument("--json", action="store_true", help="print JSON")

    methods = _command(commands, _methods, "methods", "list the methods, or explain one")
    methods.add_argument("name", metavar="NAME", nargs="?", help="a method or stage")
    return parser


def _command(commands: Any, run: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text.capitalize() + ".")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    parser.set_defaults(run=run)
    return parser


def _add_io_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--io-budget", metavar="SIZE", help="what may be read from the experts, such as 2GiB or 10%%")
    parser.add_argument("--catalog", metavar="FILE", help="catalog with statistics; without one they are gathered")
    parser.add_argument("--policy", choices=["greedy_value", "uniform_hash", "full"], help="how blocks are chosen")


def _merge(options: argparse.Namespace) -> None:
    from jaxmerge.cli.recipe import load_recipe
    from jaxmerge.errors import RecipeError
    from jaxmerge.streaming.sizes import format_bytes

    _check_place(options)
    prints = _begin_distributed(options)
    recipe = load_recipe(Path(options.recipe))
    if options.seed is not None:
        recipe = dataclasses.replace(recipe, seed=options.seed)
    if recipe._is_assembled and options.reuse is not None:
        raise RecipeError(
            f"{options.recipe}: outputs of recipes with slices, a tokenizer or a chat template have no manifest, so "
            "nothing of them can be reused; leave --reuse out"
        )
    budget = {} if options.memory_budget is None else {"memory_budget": options.memory_budget}
    if not options.dry_run:
        from jaxmerge.cli.cataloging import merge_within

        def merge(out: str, **more: Any) -> StreamReport:
            if recipe._is_assembled and (options.io_budget or options.plan) is None:
                return recipe.run(out, overwrite=options.overwrite, **budget)
            text = Path(options.recipe).read_text(encoding="utf-8")  # is kept in the manifest
            given = _io_options(options) | budget | {"recipe": text, "reuse": options.reuse} | more
            return merge_within(recipe, out, options.overwrite, given, options.plan)

        if options.store is None:
            report = merge(options.out)
            if prints:
                print(report)
        else:
            from jaxmerge.cli.storing import merge_into

            inputs = [*([] if recipe.base is None else [recipe.base]), *recipe.experts.values()]
            print(merge_into(options.store, options.name, options.expected, inputs, merge))
        return
    plan = recipe.plan(**budget)
    if not prints:
        return
    print(f"method: {recipe.method!r}")
    for name, path in [("base", recipe.base or "none"), *recipe.experts.items()]:
        print(f"{name}: {path}")
    print(f"to read: {format_bytes(plan.to_read)}")
    print(f"to write: {format_bytes(plan.to_write)}")
    print(f"memory: at most {format_bytes(plan.memory)}, beside the libraries")


def _check_place(options: argparse.Namespace) -> None:
    from jaxmerge.errors import RecipeError

    if options.store is not None and options.name is None:
        raise RecipeError("--store needs the name of a model; give --name")
    if options.store is not None and options.overwrite:
        raise RecipeError("--overwrite is for --out; in a store a merge is a new version, and the former ones stay")
    if options.store is None and (options.name or options.expected) is not None:
        raise RecipeError("--name and --expected belong to --store")


def _begin_distributed(options: argparse.Namespace) -> bool:
    """Brings the processes of a job together if that is asked for. Returns whether this one prints."""
    from jaxmerge.errors import RecipeError

    tasks = next(
        (os.environ[name] for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE") if name in os.environ), 1
    )
    if options.distributed is None and tasks not in (1, "1"):
        raise RecipeError(
            f"this command was started {tasks} times; pass --distributed to share the work between the processes, or "
            "--no-distributed to let each merge by itself, into an output of its own"
        )
    if not options.distributed:
        return True
    if options.store is not None:
        raise RecipeError("a store is written by one process; merge with --out and --distributed first")
    import jax

    if not jax.distributed.is_initialized():
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise RecipeError(
                f"--distributed: JAX cannot bring the processes together ({error!s:.200}); start one process on each "
                "host by srun, mpirun or on a TPU pod, or use examples/cluster/merge.py"
            ) from error
    return jax.process_index() == 0


def _io_options(options: argparse.Namespace) -> dict[str, Any]:
    given = {"io_budget": options.io_budget, "catalog": options.catalog, "policy": options.policy}
    return {name: value for name, value in given.items() if value is not None}


def _plan(options: argparse.Namespace) -> None:
    from jaxmerge.cli.cataloging import plan_within
    from jaxmerge.cli.output import print_table
    from jaxmerge.cli.recipe import load_recipe
    from jaxmerge.errors import RecipeError

    if options.mesh is not None:
        from jaxmerge.cli.costing import cost_on_mesh

        cost = cost_on_mesh(load_recipe(Path(options.recipe)), options.mesh, options.processes)
        print_table(f"cost of {options.recipe} on {options.mesh}", ("", ""), cost.rows())
        return
    plan = plan_within(load_recipe(Path(options.recipe)), {"io_budget": "100%"} | _io_options(options))
    if options.explain:
        expert, tensor, block = options.explain
        if not block.isdigit():
            raise RecipeError(f"--explain needs the number of a block, not {block!r}")
        text = plan.explain(expert, tensor, int(block))
    if options.save:
        plan.save(options.save)
    if options.explain:
        print(text)  # pyright: ignore[reportPossiblyUnboundVariable]
    else:
        print_table(f"plan of {options.recipe}", ("", ""), plan.rows())


def _catalog(options: argparse.Namespace) -> None:
    from jaxmerge.cli.cataloging import run_action

    if not run_action(options):
        sys.exit(1)


def _store(options: argparse.Namespace) -> None:
    from jaxmerge.cli.storing import run_action

    if not run_action(options):
        sys.exit(1)


def _verify(options: argparse.Namespace) -> None:
    from jaxmerge.streaming.manifest import load_manifest, verify_checkpoint

    faults = verify_checkpoint(options.folder)
    for fault in faults:
        print(fault)
    if faults:
        print(f"{options.folder} is not what was written: {len(faults)} tensors differ")
        sys.exit(1)
    output = load_manifest(options.folder).output
    print(f"{options.folder} is what was written: {len(output.tensors)} tensors have their hashes")


def _explain(options: argparse.Namespace) -> None:
    from jaxmerge.cli.auditing import explain_model, explain_tensor

    if options.tensor is None:
        explain_model(options.folder)
    else:
        explain_tensor(options.folder, options.tensor)


def _replay(options: argparse.Namespace) -> None:
    from jaxmerge.cli.auditing import replay
    from jaxmerge.errors import RecipeError

    if "://" in options.out:
        raise RecipeError(f"{options.out}: a replay reads what it has written; give a local folder")
    report, differing = replay(options.manifest, options.out, catalog=options.catalog, overwrite=options.overwrite)
    print(report)
    if differing:
        print(f"{len(differing)} tensors have other bytes than in {options.manifest}: {', '.join(differing[:5])}")
        sys.exit(1)
    print(f"all bytes are those of {options.manifest}")


def _inspect(options: argparse.Namespace) -> None:
    from jaxmerge.cli.inspecting import describe
    from jaxmerge.cli.output import print_table
    from jaxmerge.streaming.sizes import format_bytes

    found = describe(options.checkpoint)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    rows = []
    for tensor in found["tensors"]:
        shape = f"{tensor['dtype']}[{', '.join(map(str, tensor['shape']))}]"
        layer = "" if tensor["layer"] is None else str(tensor["layer"])
        size = format_bytes(tensor["bytes"]) if tensor["tied_to"] is None else f"tied to {tensor['tied_to']}"
        rows.append((tensor["name"], shape, tensor["kind"], layer, size))
    total = f"{len(rows)} tensors, {found['parameters']:,} parameters, {format_bytes(found['bytes'])}"
    print_table(f"{found['path']} ({found['format']}): {total}", ("tensor", "type", "kind", "layer", "size"), rows)
    for key, text in found["metadata"].items():
        print(f"{key}: {text}")


def _diff(options: argparse.Namespace) -> None:
    from jaxmerge.cli.comparing import compare
    from jaxmerge.cli.output import print_table
    from jaxmerge.cli.recipe import name_models

    experts = name_models(options.experts)
    if options.plot:  # before the long work
        _check_plot(len(experts))
    layers = compare(options.base, experts)
    if not layers:
        raise MergeError(f"{options.base}: there is no floating-point tensor to compare")
    whole = dataclasses.replace(sum(layers[1:], layers[0]), name="whole model")
    if options.plot:
        _plot(layers, list(experts), options.plot)
    if options.json:
        print(json.dumps({"experts": experts, "layers": list(map(_plain, layers)), "whole": _plain(whole)}, indent=1))
        return
    head = ("layer", "entries", "norm of base", *(f"{name}: norm, zeros" for name in experts), "cosines")
    print_table(f"task vectors relative to {options.base}", head, map(_difference_row, [*layers, whole]))
    rows = [(name, *(f"{cosine:.3f}" for cosine in row)) for name, row in zip(experts, whole.cosines, strict=True)]
    print_table("cosines over the whole model", ("", *experts), rows)


def _check_plot(experts: int) -> None:
    from importlib.util import find_spec

    if experts < 2:
        raise MergeError("--plot draws cosines between experts: found 1 expert, expected two or more")
    if find_spec("matplotlib") is None:
        raise MergeError("--plot needs matplotlib; install jaxmerge[plot]")


def _plot(layers: Sequence[Difference], experts: Sequence[str], path: str) -> None:
    from jaxmerge.plots import plot_cosines

    try:
        plot_cosines({layer.name: layer.cosines for layer in layers}, experts).savefig(path)
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no picture's
        raise MergeError(f"{path}: the picture cannot be written: {error}") from None


def _difference_row(part: Difference) -> list[str]:
    each = [f"{norm:.4g}, {share:.1%}" for norm, share in zip(part.norms, part.sparsity, strict=True)]
    pairs = [cosine for i, row in enumerate(part.cosines) for cosine in row[:i] if cosine == cosine]
    spread = " to ".join(dict.fromkeys(f"{cosine:.3f}" for cosine in (min(pairs), max(pairs)))) if pairs else ""
    return [part.name, f"{part.size:,}", f"{part.base_norm:.4g}", *each, spread]


def _plain(part: Difference) -> dict[str, Any]:
    """A difference for JSON, which has no NaN."""
    return {
        "name": part.name,
        "entries": part.size,
        "base_norm": part.base_norm,
        "norms": part.norms.tolist(),
        "sparsity": part.sparsity.tolist(),
        "cosines": [[None if cosine != cosine else cosine for cosine in row] for row in part.cosines.tolist()],
    }


def _methods(options: argparse.Namespace) -> None:
    from jaxmerge.cli.nodes import suggestion
    from jaxmerge.cli.output import print_table
    from jaxmerge.errors import RecipeError
    from jaxmerge.methods.registry import MethodTable, list_methods

    table = list_methods()
    if options.name is None:
        print_table("methods and stages", MethodTable.HEAD, table.rows())
    elif options.name in table:
        entry = table[options.name]
        print(f"{entry.name}({entry.signature})\n\n{entry.doc}")
    else:
        raise RecipeError(f"unknown method {options.name!r}{suggestion(options.name, list(table))}")
