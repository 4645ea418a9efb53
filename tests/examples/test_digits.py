"""The demo's parts: its data, its model, its checkpoints, and the way it chooses scales."""

from __future__ import annotations

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from rich.progress import Progress

import jaxmerge as jm
from examples.digits import __main__ as demo
from examples.digits.data import PRETRAINING, SIZES, TASKS, VIEWS, Split, augment, load_splits, show
from examples.digits.model import EMBED, VisionTransformer
from examples.digits.train import CHUNK, accuracies, init, logits, train


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    return load_splits()


@pytest.fixture(scope="module")
def tiny() -> tuple[nnx.GraphDef, nnx.State]:
    model = nnx.jit(lambda: VisionTransformer(nnx.Rngs(0), dim=16, depth=2, heads=2))()  # one program, not many
    return nnx.split(model, nnx.Param)


@pytest.fixture(scope="module")
def models(tiny: tuple[nnx.GraphDef, nnx.State]) -> tuple[nnx.State, dict[str, nnx.State]]:
    """A base and stand-ins for the experts: near the base, as fine-tuned models are."""
    _, base = tiny
    rng = np.random.default_rng(0)

    def near(x: jax.Array) -> jax.Array:
        return jnp.asarray(np.asarray(x) + 0.02 * rng.normal(size=x.shape), x.dtype)

    return base, {task: jax.tree.map(near, base) for task in TASKS}


def assert_same(left: nnx.State, right: nnx.State) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_every_image_is_in_one_split(splits: dict[str, Split]) -> None:
    images = np.concatenate([split.images for split in splits.values()])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images) == 1797  # no two are alike
    assert {name: len(split.digits) for name, split in splits.items()} == SIZES
    assert images.min() == 0 and images.max() == 1
    for split in splits.values():
        assert np.bincount(split.digits, minlength=10).min() > len(split.digits) / 20


def test_splits_depend_on_the_seed_alone(splits: dict[str, Split]) -> None:
    np.testing.assert_array_equal(load_splits(0)["test"].images, splits["test"].images)
    assert not np.array_equal(load_splits(1)["test"].images, splits["test"].images)


def test_tasks_ask_what_their_names_say() -> None:
    digits = np.arange(10)
    np.testing.assert_array_equal(TASKS["rotated"].class_of_digit, digits)
    np.testing.assert_array_equal(TASKS["parity"].class_of_digit, digits % 2)
    np.testing.assert_array_equal(TASKS["large"].class_of_digit, digits > 4)
    for name, classes in {"rotated": 10, "parity": 2, "large": 2}.items():
        gram = TASKS[name].embeddings @ TASKS[name].embeddings.T
        expected = np.diag(np.arange(10) < classes).astype(np.float32)
        np.testing.assert_allclose(gram, expected, atol=1e-6)  # orthonormal classes, no others


@pytest.mark.parametrize("task", TASKS)
def test_tasks_show_images_in_their_view(splits: dict[str, Split], task: str) -> None:
    images = splits["val"].images[:5]
    turned = np.stack([np.rot90(image) for image in images])
    expected = {"rotated": turned, "inverted": 1 - images, "mirrored": np.flip(images, 2)}.get(task, images)
    shown = jax.jit(lambda images, key: show(images, TASKS[task], key))(images, jax.random.key(3))
    np.testing.assert_array_equal(shown, expected)


def test_pretraining_mixes_all_views(splits: dict[str, Split]) -> None:
    image = splits["val"].images[:1]
    images = np.tile(image, (2000, 1, 1))
    shown = np.asarray(jax.jit(lambda images, key: show(images, PRETRAINING, key))(images, jax.random.key(0)))
    share = [np.mean(np.all(shown == np.asarray(view(image)), axis=(1, 2))) for view in VIEWS.values()]
    np.testing.assert_allclose(share, PRETRAINING.views, atol=0.03)


def test_augmentation_moves_images_a_little(splits: dict[str, Split]) -> None:
    images = splits["val"].images
    moved = jax.jit(augment)(images, jax.random.key(0))
    assert moved.shape == images.shape
    assert np.min(moved) >= 0 and np.max(moved) <= 1
    flat = [np.asarray(x).reshape(len(images), -1) for x in (images, moved, np.roll(images, 1, axis=0))]
    cosine = [np.sum(flat[0] * x, 1) / np.linalg.norm(flat[0], axis=1) / np.linalg.norm(x, axis=1) for x in flat[1:]]
    assert 0.8 < cosine[0].mean() < 0.99 and cosine[0].mean() > cosine[1].mean() + 0.1  # more alike than another image


def test_model_gives_unit_vectors_under_readable_names(splits: dict[str, Split]) -> None:
    model, params = init(0)
    names = jm.named_leaves(params)
    assert names["blocks/2/attn/query/kernel"].shape == (96, 96)
    assert names["pos_embed"].shape == (16, 96)
    assert sum(name.startswith("blocks/") for name in names) == 3 * 16
    vectors = jax.jit(lambda params, images: nnx.merge(model, params)(images))(params, splits["val"].images[:7])
    assert vectors.shape == (7, EMBED)
    np.testing.assert_allclose(jnp.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_patches_are_squares_of_the_image(tiny: tuple[nnx.GraphDef, nnx.State]) -> None:
    """Changing one pixel must change the embedding of the one patch that holds it."""
    model = nnx.merge(*tiny)
    seen = []
    model.patch_embed = lambda patches: seen.append(patches) or jnp.zeros((*patches.shape[:2], 16))  # pyright: ignore

    @jax.jit
    def patches(images: jax.Array) -> jax.Array:
        model(images)
        return seen.pop()

    images = np.zeros((4, 8, 8), np.float32)
    for image, pixel in zip(images, ((0, 0), (1, 1), (2, 5), (7, 7)), strict=True):
        image[pixel] = 1
    assert patches(jnp.asarray(images)).max(axis=2).argmax(axis=1).tolist() == [0, 0, 6, 15]


def test_absent_classes_are_never_answered(tiny: tuple[nnx.GraphDef, nnx.State], splits: dict[str, Split]) -> None:
    model, params = tiny
    images = splits["val"].images[:4]
    scores = jax.jit(lambda params, images: logits(model, params, TASKS["parity"], images))(params, images)
    assert np.isfinite(scores[:, :2]).all() and np.isneginf(scores[:, 2:]).all()


def test_training_learns_and_is_reproducible(tiny: tuple[nnx.GraphDef, nnx.State], splits: dict[str, Split]) -> None:
    model, params = tiny
    steps: list[int] = []

    def learn(seed: int) -> nnx.State:
        task, split = TASKS["parity"], splits["train"]
        with jax.numpy_dtype_promotion("standard"):  # Adam in optax raises a float to an integer power
            return train(model, params, task, split, steps=2 * CHUNK, peak=1e-2, seed=seed, advance=steps.append)

    trained = learn(0)
    assert steps == [CHUNK, CHUNK]
    task = {"parity": TASKS["parity"]}
    before, after = (accuracies(model, p, task, splits["test"])["parity"] for p in (params, trained))
    assert before < 0.65 and after > 0.8
    assert_same(trained, learn(0))
    first, second = (jm.named_leaves(p)["pos_embed"] for p in (trained, learn(1)))
    assert not np.array_equal(first, second)


def test_models_are_saved_in_three_formats_and_merge_on_disk(tmp_path, monkeypatch, models) -> None:
    monkeypatch.setattr(demo, "OUT", tmp_path)
    monkeypatch.setattr(demo, "SHARD_BYTES", 20_000)
    base, experts = models
    paths = demo.save_models(base, experts)
    assert (paths["rotated"] / "model.safetensors.index.json").exists()
    assert {name: jm.open_checkpoint(path).format for name, path in paths.items()} == {
        name: "orbax" if name == "inverted" else "safetensors" for name in ("base", *TASKS)
    }
    for name, params in {"base": base, **experts}.items():
        assert_same(demo.load(paths[name], like=base), params)

    merge = demo.Merge("TIES, all (of them)", jm.ties(), tuple(experts), scale=1.0)
    report = demo.merge_on_disk(merge, paths)
    assert report.path == tmp_path / "merged" / "ties-all-of-them"
    assert set(report.bytes_read) == {"the base", *TASKS} and min(report.bytes_read.values()) > 0
    in_memory = jm.merge(jm.ties(), experts, base=base)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), demo.load(report.path, like=base), in_memory)

    own, found = (
        dict.fromkeys(TASKS, 0.8),
        {"rotated": 0.4, "inverted": 0.8, "mirrored": 0.8, "parity": 0.8, "large": 0.6},
    )
    console = Console(width=demo.TABLE_WIDTH, file=io.StringIO(), record=True)
    console.print(demo.make_table(found, own, [demo.Row(merge, report, found)]))
    line = next(line for line in console.export_text().splitlines() if "TIES, all" in line)
    mebibytes = f"{report.memory_peak / 2**20:.0f}"
    assert line.split()[4:12] == ["1.0", "40.0", "80.0", "80.0", "80.0", "60.0", "68.0", "85.0"]
    assert line.split()[-1] == mebibytes
    demo.draw(paths, found, own, [demo.Row(merge, report, found)])
    for picture in ("scores.png", "cosines.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("family", demo.FAMILIES, ids=lambda family: next(iter(family)))
def test_methods_whose_scale_is_chosen_are_linear_in_it(family, models) -> None:
    """What `choose_scales` relies on."""
    base, experts = models
    make = next(iter(family.values()))
    zero, part, one = (jm.merge(make(scale), experts, base=base) for scale in (0.0, 0.25, 1.0))
    between = jm.apply_task_vector(zero, jm.task_vector(one, zero), 0.25)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), part, between)


def test_scale_is_the_best_on_validation_images(tiny, models, splits: dict[str, Split], monkeypatch) -> None:
    base, experts = models
    split = Split(splits["val"].images[:60], splits["val"].digits[:60])
    monkeypatch.setattr(demo, "FAMILIES", demo.FAMILIES[:1])
    monkeypatch.setattr(demo, "SCALES", [0.5, 4.0])
    with Progress(disable=True) as bars:
        merges = demo.choose_scales(tiny[0], base, experts, split, bars)
    means = []
    for scale in demo.SCALES:
        merged = jm.merge(jm.task_arithmetic(scale), experts, base=base)
        means.append(np.mean(list(accuracies(tiny[0], merged, TASKS, split).values())))
    assert means[0] != means[1]
    assert [merge.name for merge in merges] == list(demo.FAMILIES[0])
    assert {merge.scale for merge in merges} == {demo.SCALES[int(np.argmax(means))]}
