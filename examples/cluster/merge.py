"""One merge on many hosts: every process runs this program, and each does its share.

    python merge.py RECIPE --out MERGED                    # a checkpoint on a file system that all hosts share
    python merge.py RECIPE --load                          # arrays on the devices of all hosts, ready to train or serve

Under Slurm, Open MPI and on TPU pods JAX finds the other processes by itself. Elsewhere tell it:

    python merge.py RECIPE --out MERGED --coordinator HOST:PORT --count 2 --index 0    # and 1 on the other
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxmerge as jm


def main(arguments: Sequence[str] | None = None) -> Any:
    """Merges, and returns the report, or the parameters that were loaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, as for `jaxmerge merge`")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", metavar="DIR", help="folder to write")
    what.add_argument("--load", action="store_true", help="merge into the memory of all devices")
    parser.add_argument("--memory-budget", metavar="SIZE", default="1GiB", help="memory for the work on each host")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 runs, and a free port there")
    parser.add_argument("--count", metavar="N", type=int, help="number of processes")
    parser.add_argument("--index", metavar="I", type=int, help="number of this process, from 0")
    options = parser.parse_args(arguments)

    # Before anything else asks JAX for a device.
    jax.distributed.initialize(options.coordinator, options.count, options.index)
    recipe = jm.load_recipe(options.recipe)
    if options.load:
        return load(recipe)
    report = recipe.run(options.out, memory_budget=options.memory_budget, overwrite=options.overwrite)
    if jax.process_index() == 0:
        print(report)
    return report


def load(recipe: jm.Recipe) -> Any:
    """The merged parameters on all devices, each cut along its longest axis that can be cut."""
    mesh = Mesh(jax.devices(), ("devices",), axis_types=(AxisType.Auto,))
    with jm.open_checkpoint(recipe.base or next(iter(recipe.experts.values()))) as reference:
        shardings = {name: cut(leaf.shape, mesh) for name, leaf in jm.named_leaves(reference.params).items()}
    params = jm.load_merged(
        recipe.method,
        recipe.experts,
        base=recipe.base,
        shardings=shardings,
        key=recipe.seed,
        rules=recipe.rules,
        dtype=recipe.dtype,
    )
    held = sum(shard.data.nbytes for x in jm.named_leaves(params).values() for shard in x.addressable_shards)
    print(f"process {jax.process_index()} of {jax.process_count()} holds {held / 2**20:.1f} MiB of the merged model")
    return params


def cut(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """A sharding along the longest axis that the number of devices divides; whole on each device if there is none."""
    fitting = [axis for axis, n in enumerate(shape) if n % math.prod(mesh.devices.shape) == 0]
    longest = max(fitting, key=shape.__getitem__, default=None)
    return NamedSharding(mesh, PartitionSpec(*("devices" if axis == longest else None for axis in range(len(shape)))))


if __name__ == "__main__":
    main()
