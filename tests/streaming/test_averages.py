"""Averages of many checkpoints on disk, and greedy soups."""

import os
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.streaming import averages


def make_run(folder: Path, count: int, suffix: str = ".safetensors", seed: int = 0) -> tuple[list[Path], list[dict]]:
    """Checkpoints of a run, with tied weights and an integer tensor; on disk and in memory."""
    rng = np.random.default_rng(seed)
    trees = []
    for _ in range(count):
        embedding = rng.standard_normal((6, 4)).astype(ml_dtypes.bfloat16)
        kernel = rng.standard_normal((40, 50)).astype(ml_dtypes.bfloat16)
        norm = rng.standard_normal(4).astype(np.float32)
        trees.append({"embed": embedding, "head": embedding, "kernel": kernel, "norm": norm, "ids": np.arange(3)})
    paths = [folder / f"step_{i}{suffix}" for i in range(count)]
    for path, tree in zip(paths, trees, strict=True):
        jm.save_checkpoint(path, tree, metadata={"made": "here"})
    return paths, trees


def loaded(path: str | Path) -> dict:
    with jm.open_checkpoint(path) as checkpoint:
        return {name: np.asarray(x) for name, x in checkpoint.params.items()}


def weighted_mean(trees: list[dict], weights) -> dict:
    """In float64, rounded once."""
    mean = {}
    for name, first in trees[0].items():
        if first.dtype.kind == "i":
            mean[name] = first
        else:
            wide = [tree[name].astype(np.float64) for tree in trees]
            total = sum(w * x for w, x in zip(weights, wide, strict=True)) / np.sum(weights)
            mean[name] = total.astype(np.float32).astype(first.dtype)
    return mean


def check_near(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        a, b = found[name].astype(np.float64), value.astype(np.float64)
        # A float32 mean that is a little off rounds to the other neighbour in a few places.
        close = np.isclose(a, b, rtol=0, atol=1e-6)
        assert close.mean() > 0.98, name
        np.testing.assert_allclose(a, b, rtol=2.0**-7 if value.dtype.itemsize == 2 else 0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ""])
def test_the_mean_of_any_number(suffix: str, tmp_path: Path) -> None:
    paths, trees = make_run(tmp_path, 11, suffix)
    report = jm.average_checkpoints(paths, out=tmp_path / f"mean{suffix}")
    check_near(loaded(tmp_path / f"mean{suffix}"), weighted_mean(trees, [1] * 11))
    assert (report.tensors, report.merged) == (4, 3)
    assert report.bytes_read == {"11 checkpoints": 11 * sum(x.nbytes for n, x in trees[0].items() if n != "head")}
    with jm.open_checkpoint(tmp_path / f"mean{suffix}") as mean:
        assert mean.metadata["made"] == "here"
        assert mean.aliases == {"head": "embed"}


def test_it_is_what_merging_gives(tmp_path: Path) -> None:
    paths, _ = make_run(tmp_path, 3)
    weights = {"a": 0.2, "b": 0.5, "c": 0.3}
    named = dict(zip("abc", paths, strict=True))
    jm.average_checkpoints(named, out=tmp_path / "mean.npz", weights=weights)
    jm.merge_checkpoint(jm.linear(weights), named, out=tmp_path / "merged.npz")
    check_near(loaded(tmp_path / "mean.npz"), loaded(tmp_path / "merged.npz"))


def test_weights_and_decay(tmp_path: Path) -> None:
    paths, trees = make_run(tmp_path, 10)
    weights = [1.0, 0.0, 2.0, 3.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.5]
    jm.average_checkpoints(paths, out=tmp_path / "ema.npz", weights=weights, decay=0.7)
    effective = np.array(weights) * 0.7 ** np.arange(9, -1, -1.0)
    check_near(loaded(tmp_path / "ema.npz"), weighted_mean(trees, effective))

    state = jm.running_average(trees[0], decay=0.7)
    for tree, weight in zip(trees, weights, strict=True):
        state = state.update(tree, weight)
    check_near(
        loaded(tmp_path / "ema.npz"), {n: np.asarray(x) for n, x in state.params().items()} | {"ids": np.arange(3)}
    )


def test_more_checkpoints_than_files_may_be_open(tmp_path: Path) -> None:
    paths, trees = make_run(tmp_path, 64)
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = [path.open("rb") for path in paths]  # what a program has open already does not count
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 40, allowed[1]))
    try:
        with pytest.raises(jm.CheckpointError, match="Too many open files"):
            jm.merge_checkpoint(jm.linear(), paths, out=tmp_path / "merged.npz")
        report = jm.average_checkpoints(paths, out=tmp_path / "mean.npz")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)
        for file in others:
            file.close()
    check_near(loaded(tmp_path / "mean.npz"), weighted_mean(trees, [1] * 64))
    assert report.bytes_read == {"64 checkpoints": 64 * sum(x.nbytes for n, x in trees[0].items() if n != "head")}


def test_memory_and_programs_do_not_grow_with_the_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths, _ = make_run(tmp_path, 24)
    planned = []
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for count in (8, 16, 24):
            before = len(caplog.records)
            report = jm.average_checkpoints(paths[:count], out=tmp_path / f"{count}.npz")
            compiled = [r for r in caplog.records[before:] if r.getMessage().startswith("Compiling jit(_move)")]
            assert count == 8 or not compiled
            planned.append(report.memory_planned)
    assert planned[0] == planned[1] == planned[2]


def test_slices_of_an_average_that_nobody_has_written(tmp_path: Path) -> None:
    paths, trees = make_run(tmp_path, 3)
    tensors = [jm.open_checkpoint(path).params["kernel"] for path in paths]
    tensor = averages.AveragedTensor("kernel", tensors, averages._rates(None, 1.0, ("a", "b", "c")), None)
    wanted = weighted_mean(trees, [1] * 3)["kernel"]
    check_near({"": tensor[3:9, 5]}, {"": wanted[3:9, 5]})
    check_near({"": tensor[...]}, {"": wanted})


def test_folders_bring_their_side_files(tmp_path: Path) -> None:
    paths, _ = make_run(tmp_path, 2, "")
    for path in paths:
        (path / "config.json").write_text(path.name)
    jm.average_checkpoints(paths, out=tmp_path / "mean")
    assert (tmp_path / "mean" / "config.json").read_text() == "step_0"


def test_mistakes_are_told_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, trees = make_run(tmp_path, 3)
    out = tmp_path / "out.npz"
    bad = jm.save_checkpoint(tmp_path / "bad.npz", trees[0] | {"norm": np.array([0, np.inf, 0, 0], np.float32)})
    for arguments, error, told in [
        ({"weights": [1, 2]}, jm.RecipeError, "found 2 weights, expected 3"),
        ({"weights": [1, -2, 3]}, jm.RecipeError, "weight is -2"),
        ({"weights": [0, 0, 0]}, jm.RecipeError, "every weight is 0"),
        ({"weights": {"a": 1}}, jm.RecipeError, "weights are given for"),
        ({"decay": 0.0}, jm.RecipeError, "decay is 0"),
    ]:
        with pytest.raises(error, match=told):
            jm.average_checkpoints(paths, out=out, **arguments)
    with pytest.raises(jm.NonFiniteError, match="'expert_3', tensor 'norm'"):
        jm.average_checkpoints([*paths, bad], out=out)
    with pytest.raises(jm.StructureError, match="lacks"):
        jm.average_checkpoints([paths[0], {"kernel": trees[0]["kernel"]}], out=out)
    monkeypatch.setattr(averages, "files_kept_open", lambda: 1)
    for files in (1, 0):  # whether it is still open or not
        with pytest.raises(jm.ConflictError, match="the input"):
            jm.average_checkpoints(paths, out=paths[files], overwrite=True)
    assert not out.exists()
    jm.average_checkpoints([*paths, bad], out=out, allow_nonfinite=True)
    assert not np.isfinite(loaded(out)["norm"][1])


# Greedy soups

TARGET = np.linspace(-1, 1, 6)


def closeness(params) -> float:
    assert isinstance(params["w"], jax.Array)
    return -float(np.abs(np.asarray(params["w"], np.float64) - TARGET).mean())


def make_experts(seed: int, count: int = 6) -> dict[str, dict]:
    rng = np.random.default_rng(seed)
    errors = rng.standard_normal((count, 6)) * rng.uniform(0.1, 1, (count, 1))
    return {f"m{i}": {"w": (TARGET + e).astype(np.float32), "ids": np.arange(i, i + 2)} for i, e in enumerate(errors)}


def by_hand(experts: dict[str, dict]) -> tuple[list[str], np.ndarray]:
    order = sorted(experts, key=lambda name: -closeness(jax.tree.map(jnp.asarray, experts[name])))
    taken: list[str] = []

    def score(names):
        return -np.abs(np.mean([experts[n]["w"].astype(np.float64) for n in names], axis=0) - TARGET).mean()

    for name in order:
        if not taken or score([*taken, name]) >= score(taken):
            taken.append(name)
    return taken, np.mean([experts[n]["w"].astype(np.float64) for n in taken], axis=0)


@pytest.mark.parametrize("seed", range(4))
def test_a_greedy_soup_takes_what_helps(seed: int) -> None:
    experts = make_experts(seed)
    taken, mean = by_hand(experts)
    soup = jm.greedy_soup(experts, closeness)
    assert list(soup.taken) == taken
    np.testing.assert_allclose(soup.params["w"], mean, atol=1e-6)
    assert soup.score == closeness(soup.params) >= max(trial.alone for trial in soup.trials)
    assert [trial.name for trial in soup.trials] == sorted(
        experts, key=lambda n: -closeness({"w": jnp.asarray(experts[n]["w"])})
    )
    np.testing.assert_array_equal(soup.params["ids"], experts[taken[0]]["ids"])


def test_a_greedy_soup_of_checkpoints_opens_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxmerge.streaming import greedy_soup as module

    experts = make_experts(1)
    paths = {name: jm.save_checkpoint(tmp_path / f"{name}.npz", tree) for name, tree in experts.items()}
    opened = []

    def open_alone(path):
        opened.append(jm.open_checkpoint(path))
        for other in opened[:-1]:
            with pytest.raises(jm.CheckpointError, match="closed"):
                other.params["w"][...]
        return opened[-1]

    monkeypatch.setattr(module, "open_checkpoint", open_alone)
    of_paths, of_trees = jm.greedy_soup(paths, closeness), jm.greedy_soup(experts, closeness)
    assert of_paths.trials == of_trees.trials
    np.testing.assert_array_equal(of_paths.params["w"], of_trees.params["w"])


def test_what_is_scored_is_what_is_returned_in_half_precision() -> None:
    experts = {n: {"w": x["w"].astype(ml_dtypes.bfloat16)} for n, x in make_experts(2).items()}
    soup = jm.greedy_soup(experts, closeness)
    assert soup.params["w"].dtype == jnp.bfloat16
    assert soup.score == closeness(soup.params)


def test_known_scores_are_not_asked_for_again() -> None:
    experts = make_experts(3)
    asked = []

    def counted(params):
        asked.append(params)
        return closeness(params)

    full = jm.greedy_soup(experts, counted)
    assert len(asked) == 2 * len(experts) - 1
    asked.clear()
    alone = {trial.name: trial.alone for trial in full.trials}
    again = jm.greedy_soup(experts, counted, alone=alone)
    assert len(asked) == len(experts) - 1
    assert again.trials == full.trials
    assert jm.greedy_soup(list(experts.values()), counted, alone=[alone[n] for n in experts]).score == full.score


def test_an_equal_score_is_good_enough() -> None:
    soup = jm.greedy_soup({n: {"w": np.ones(3, np.float32)} for n in "ab"}, lambda params: 1)
    assert soup.taken == ("a", "b")


def test_a_soup_prints(capsys: pytest.CaptureFixture[str]) -> None:
    soup = jm.greedy_soup(make_experts(1), closeness, progress=True)
    assert capsys.readouterr().err.count("with the soup") == 5
    assert len([line for line in str(soup).splitlines() if " m" in line]) == 6
    assert repr(soup).startswith(f"GreedySoup({', '.join(soup.taken)} of 6 experts")
    assert soup._repr_html_().count("<tr>") == 7


def test_mistakes_with_soups_are_told() -> None:
    experts = make_experts(0)
    with pytest.raises(jm.RecipeError, match="the score of expert 'm0' is NaN"):
        jm.greedy_soup(experts, lambda params: float("nan"))
    with pytest.raises(jm.RecipeError, match="found 1 scores, expected 6"):
        jm.greedy_soup(experts, closeness, alone=[1.0])
    with pytest.raises(jm.RecipeError, match="scores are given for"):
        jm.greedy_soup(experts, closeness, alone={"another": 1.0})
    with pytest.raises(jm.ShapeError, match="expert 'm5', tensor 'w'"):
        jm.greedy_soup(experts | {"m5": {"w": np.zeros(2, np.float32), "ids": np.arange(2)}}, closeness)
