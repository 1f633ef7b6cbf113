"""The predictor: inputs, modes, procedures, and images that are streamed through a file."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tests.small_checkpoint import photo, write_checkpoint
from utils import rankdice
from utils.checkpoint import load_model
from utils.errors import UserError
from utils.images import ValueRange
from utils.predict import PredictOptions, label_map
from utils.predict import spool as streaming
from utils.predict.tiling import Block
from utils.predictor import Predictor, Segmentation, choose_device
from utils.rankdice import Options, rank_dice


@pytest.fixture(scope="module")
def one_class(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "one.pth", num_classes=1)


def network_probs(path: Path, image: np.ndarray) -> Tensor:
    """Return the probabilities step by step: normalize, network, softmax."""
    loaded = load_model(path)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].double() / 255
    x = (x - torch.tensor(loaded.facts.mean).view(1, 3, 1, 1)) / torch.tensor(loaded.facts.std).view(1, 3, 1, 1)
    with torch.no_grad():
        return loaded.model(x.float()).softmax(1)


# ------------------------------------------------------------------------------------------- what goes in


def test_any_kind_of_image(model: Path, tmp_path: Path) -> None:
    predict, image = Predictor(model, mode="single"), photo(40, 50)
    Image.fromarray(image).save(tmp_path / "a.png")
    expected = predict(image)
    assert expected.labels.shape == (40, 50)
    assert expected.labels.dtype == np.uint8
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    kinds = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        Image.fromarray(image),
        image,
        tensor,
        tensor.float() / 255,
        image.astype(np.float64) / 255,
        image.astype(np.uint16) * 257,
        Image.fromarray(np.dstack([image, np.full((40, 50), 9, np.uint8)])),
    ]
    for kind in kinds:
        np.testing.assert_array_equal(predict(kind).labels, expected.labels)
    assert predict((tensor.float() / 255).bfloat16()).labels.shape == (40, 50)
    several = predict([image, tensor, photo(33, 34)])
    assert [s.labels.shape for s in several] == [(40, 50), (40, 50), (33, 34)]
    np.testing.assert_array_equal(np.asarray(several[1]), expected.labels)


def test_gray_is_repeated_for_a_color_model(model: Path) -> None:
    gray = photo(20, 30, 1)
    predict = Predictor(model, mode="single")
    expected = predict(np.repeat(gray, 3, axis=2)).labels
    for kind in (gray, gray[:, :, 0], Image.fromarray(gray[:, :, 0])):
        np.testing.assert_array_equal(predict(kind).labels, expected)


@pytest.mark.parametrize("bad", [np.zeros((4,)), torch.zeros(4, 4), np.zeros((0, 4, 3))])
def test_arrays_that_are_no_images_are_refused(model: Path, bad: object) -> None:
    with pytest.raises(ValueError, match="images"):
        Predictor(model)(bad)
    with pytest.raises(UserError, match="has 7 channels, but `in_channels` is 3"):
        Predictor(model)(np.zeros((4, 4, 7), np.uint8))


def test_other_objects_are_refused(model: Path) -> None:
    with pytest.raises(TypeError, match="images"):
        Predictor(model)({"a": 1})


@pytest.mark.parametrize("mode", ["multiscale", "sliding", "single"])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (7, 5)])
def test_tiny_images(model: Path, mode: str, size: tuple[int, int]) -> None:
    assert Predictor(model, mode=mode)(photo(*size)).labels.shape == size


# ------------------------------------------------------------------------------------------- modes, procedures


def test_single_mode_is_the_network(model: Path) -> None:
    image = photo(45, 61)
    predict = Predictor(model, mode="single", keep_probs=True)
    result = predict(image)
    expected = network_probs(model, image)
    torch.testing.assert_close(result.probs[None], expected, rtol=1e-4, atol=1e-5)
    found = rank_dice(result.probs[None])
    assert found.volumes.any()
    np.testing.assert_array_equal(result.masks, found.masks[0].numpy())
    np.testing.assert_allclose(result.scores, found.scores[0], rtol=1e-6)
    np.testing.assert_array_equal(result.volumes, found.volumes[0])
    np.testing.assert_array_equal(result.labels, label_map("rankdice", result.probs[None])[0])


def test_max_and_threshold(model: Path) -> None:
    image = photo(45, 61)
    probs = network_probs(model, image)[0].numpy()
    result = Predictor(model, mode="single", predict="max")(image)
    agree = result.labels == probs.argmax(0)
    assert agree.mean() > 0.999
    assert result.scores is None
    assert result.expected is None
    options = PredictOptions(threshold=0.6)
    labels = Predictor(model, mode="single", predict="T", options=options)(image).labels
    assert (labels == 255).any()
    expected = np.where(probs.max(0) > 0.6, probs.argmax(0), 255)
    assert (labels == expected).mean() > 0.999


def test_temperature_of_the_config_is_used(tmp_path: Path) -> None:
    image = photo(30, 30)
    hot = write_checkpoint(tmp_path / "hot.pth", temperature=2.5)
    first = Predictor(hot, mode="single", keep_probs=True)(image).probs
    second = Predictor(write_checkpoint(tmp_path / "m.pth"), mode="single", keep_probs=True, temperature=2.5)(image)
    assert torch.equal(first, second.probs)


@pytest.mark.parametrize("mode", ["multiscale", "sliding", "single"])
def test_a_batch_gives_what_single_images_give(model: Path, mode: str) -> None:
    predict = Predictor(model, mode=mode, batch_size=3, flip=True, keep_probs=True)
    images = [photo(60, 70, seed=seed) for seed in range(4)]
    for image, together in zip(images, predict(images), strict=True):
        alone = predict(image)
        torch.testing.assert_close(together.probs, alone.probs, rtol=1e-4, atol=1e-5)


def test_flip_makes_the_result_symmetric(model: Path) -> None:
    image = photo(40, 48)
    for mode in ("single", "multiscale"):
        predict = Predictor(model, mode=mode, flip=True, keep_probs=True)
        one, other = predict(image).probs, predict(image[:, ::-1].copy()).probs
        torch.testing.assert_close(one, other.flip(-1), rtol=1e-3, atol=1e-4)


def test_half_precision_is_near(model: Path) -> None:
    image = photo(64, 80)
    full = Predictor(model, mode="single", keep_probs=True)(image)
    half = Predictor(model, mode="single", keep_probs=True, amp=True)(image)
    assert half.probs.dtype == torch.float32
    assert 0 < (full.probs - half.probs).abs().mean() < 0.02


def test_large_views_are_cut_into_tiles(model: Path) -> None:
    image = photo(100, 120)
    whole = Predictor(model, mode="multiscale", keep_probs=True)(image)
    tiled = Predictor(model, mode="multiscale", keep_probs=True, max_pixels=30_000)(image)
    assert (whole.tiled, tiled.tiled) == (False, True)
    assert (whole.probs - tiled.probs).abs().mean() < 0.1
    assert not torch.equal(whole.probs, tiled.probs)


def test_the_default_tile_is_the_crop_of_the_training(model: Path) -> None:
    assert Predictor(model).cut.sides == (48, 48)
    assert Predictor(model, tile=64).cut.sides == (64, 64)
    assert Predictor(model, tile=(40, 64)).cut.sides == (40, 64)
    with pytest.raises(ValueError, match="tile: expected at least 1"):
        Predictor(model, tile=0)


def test_one_class(one_class: Path) -> None:
    image = photo(50, 50)
    for procedure in ("T", "max", "rankdice"):
        result = Predictor(one_class, mode="single", predict=procedure)(image)
        assert set(np.unique(result.labels)) <= {0, 1}
        assert result.labels.any()
    assert result.volumes[0] == result.labels.sum()
    np.testing.assert_array_equal(result.masks[0], result.labels == 1)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("predict", "argmax"),
        ("mode", "slide"),
        ("tile", -1),
        ("overlap", 1.0),
        ("batch_size", 0),
        ("scales", ()),
        ("scales", (1.0, -1.0)),
        ("temperature", 0.0),
        ("max_pixels", 0),
    ],
)
def test_bad_arguments_are_named(model: Path, argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=argument):
        Predictor(model, **{argument: value})


def test_classes_of_interest_must_exist(model: Path) -> None:
    with pytest.raises(UserError, match=r"CoI.*\[9\].*0 to 3"):
        Predictor(model, options=PredictOptions(classes=(1, 9)))


@pytest.mark.parametrize("device", ["cuda:77", "99", "graphics"])
def test_devices_that_are_not_there(model: Path, device: str) -> None:
    with pytest.raises(UserError, match="cannot be used"):
        Predictor(model, device=device)


# ------------------------------------------------------------------------------------------- streaming


def spool_of(probs: Tensor, rows: int = 7, columns: int = 11) -> streaming.Spool:
    """Write ``(C, H, W)`` in blocks, strip by strip, like the tiles of a large image."""
    classes, height, width = probs.shape
    spool = streaming.Spool(classes, height, width)
    for x in range(0, width, columns):
        for y in range(0, height, rows):
            spool.write(Block(y, x, probs[:, y : y + rows, x : x + columns]))
    return spool


def some_probs(classes: int = 4, height: int = 40, width: int = 33, seed: int = 0, sharpness: float = 3.0) -> Tensor:
    """Return smooth probabilities that float16 represents exactly."""
    noise = torch.randn(1, classes, 6, 6, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(noise, size=(height, width), mode="bicubic")[0]
    probs = smooth.mul(sharpness).softmax(0) if classes > 1 else smooth.mul(sharpness).sigmoid()
    return probs.half().float()


def test_spool_returns_what_was_written() -> None:
    probs = some_probs()
    with closing(spool_of(probs)) as spool:
        for max_bytes in (1, 3000, 2**25):
            rows = list(spool.bands(max_bytes))
            assert [y for y, _ in rows] == np.cumsum([0] + [b.shape[1] for _, b in rows])[:-1].tolist()
            np.testing.assert_array_equal(np.concatenate([b for _, b in rows], axis=1), probs.half().numpy())
        np.testing.assert_array_equal(np.concatenate(list(spool.planes(2))), probs[2].half().numpy())
        counts = spool.counts()
    assert (counts.sum(1) == probs[0].numel()).all()
    np.testing.assert_allclose(counts @ streaming.HALF_VALUES, probs.double().sum((1, 2)), rtol=1e-12)


def table(row: Tensor) -> Tensor:
    """Count the float16 values of a row."""
    return row.half().flatten().view(torch.int16).long().bincount(minlength=len(streaming.HALF_VALUES))


@given(
    seed=st.integers(0, 10**6),
    pixels=st.integers(1, 300),
    low=st.floats(0.05, 4),
    high=st.floats(0.05, 4),
    levels=st.sampled_from([0, 2, 5]),
    metric=st.sampled_from(["dice", "iou"]),
    smooth=st.sampled_from([0.0, 1.0]),
    prune=st.sampled_from([None, 0.5]),
    solver=st.sampled_from(["exact", "rma"]),
)
@settings(max_examples=150, deadline=None)
def test_rank_dice_of_a_table_is_rank_dice_of_the_pixels(
    seed: int, pixels: int, low: float, high: float, levels: int, metric: str, smooth: float, prune: float | None,
    solver: str,
) -> None:  # fmt: skip
    """Rows of all shapes, with many equal values: the same expected score, and the same pixels unless they tie."""
    row = np.random.default_rng(seed).beta(low, high, pixels)
    row = np.round(row * levels) / levels if levels else row
    row = torch.from_numpy(row).half().double()
    expected = rank_dice(row[None, None], metric, solver, smooth, prune)
    values = torch.from_numpy(streaming.HALF_VALUES)
    pixels, _, score = rankdice.rank_counts(values, table(row)[None], Options(metric, solver, smooth, prune))
    assert float(score) == pytest.approx(float(expected.scores), rel=1e-7, abs=1e-9)
    if int(pixels) != int(expected.volumes):
        assert float(score) == pytest.approx(float(expected.scores), rel=1e-12)  # a tie


def test_top_pixels_breaks_ties_by_index() -> None:
    probs = (some_probs(2, 30, 25) * 6).round() / 6
    for pixels in (1, 100, 333, 750):
        order = probs[1].flatten().argsort(descending=True, stable=True)
        expected = torch.zeros(750, dtype=torch.bool).index_fill_(0, order[:pixels], True).view(30, 25)
        cut = float(probs[1].flatten()[order[pixels - 1]].half())
        with closing(spool_of(probs)) as spool:
            got = streaming.top_pixels(spool, 1, pixels, cut)
        np.testing.assert_array_equal(got, expected.numpy())


@pytest.mark.parametrize("classes", [None, (1, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_label_map_of_a_spool_is_that_of_the_tensor(seed: int, classes: tuple[int, ...] | None) -> None:
    probs = some_probs(5, seed=seed, sharpness=1.0)
    expected = rankdice.label_map(probs[None], classes)[0]
    with closing(spool_of(probs)) as spool:
        got = streaming.label_map(spool, spool.counts(), classes)
    np.testing.assert_array_equal(got, expected.numpy())


def test_label_maps_are_more_than_the_most_probable_class() -> None:
    probs = some_probs(5, seed=0, sharpness=1.0)
    with closing(spool_of(probs)) as spool:
        got = streaming.label_map(spool, spool.counts())
    assert (got != probs.argmax(0).numpy()).any()


@pytest.mark.parametrize("procedure", ["rankdice", "max", "T"])
@pytest.mark.parametrize("keep_probs", [False, True])
def test_streamed_images_get_what_others_get(model: Path, procedure: str, keep_probs: bool) -> None:
    image = photo(150, 170)
    arguments = {"mode": "sliding", "predict": procedure, "keep_probs": True, "batch_size": 5}
    whole = Predictor(model, **arguments)(image)
    predict = Predictor(model, **(arguments | {"memory": 4 * 4 * 48 * 100, "keep_probs": keep_probs}))
    assert predict.streams(150, 170)
    streamed = predict(image)
    assert (streamed.labels == whole.labels).mean() > 0.999  # float16 changes near ties
    assert streamed.masks is None
    if procedure == "rankdice":
        np.testing.assert_allclose(streamed.scores, whole.scores, atol=2e-4)
        np.testing.assert_allclose(streamed.volumes, whole.volumes, rtol=0.002, atol=2)
    if keep_probs:
        for c in range(4):
            plane = np.concatenate(list(streamed.probs.planes(c)))
            np.testing.assert_allclose(plane, whole.probs[c], atol=6e-4)
        streamed.probs.close()


def test_streamed_classes_of_interest(model: Path) -> None:
    """Classes of interest limit the masks and scores; label maps contain all classes, as for other images."""
    image, options = photo(150, 170), PredictOptions(classes=(0, 2), presence="all")
    whole = Predictor(model, mode="sliding", options=options)(image)
    streamed = Predictor(model, mode="sliding", options=options, memory=4 * 4 * 48 * 100)(image)
    assert (streamed.labels == whole.labels).mean() > 0.999
    np.testing.assert_allclose(streamed.scores, whole.scores, atol=2e-4)
    assert whole.volumes.nonzero()[0].tolist() == streamed.volumes.nonzero()[0].tolist() == [0, 2]


def test_streamed_masks_of_the_highest_iou(model: Path) -> None:
    image, options = photo(150, 170), PredictOptions(metric="iou")
    whole = Predictor(model, mode="sliding", options=options)(image)
    streamed = Predictor(model, mode="sliding", options=options, memory=4 * 4 * 48 * 100)(image)
    np.testing.assert_array_equal(whole.labels, Predictor(model, mode="sliding")(image).labels)  # as for Dice
    assert (streamed.labels == whole.labels).mean() > 0.999
    np.testing.assert_allclose(streamed.scores, whole.scores, atol=2e-4)


@pytest.mark.parametrize("procedure", ["max", "rankdice"])
@pytest.mark.parametrize("presence", ["fitted", "rule", "prune", "all"])
def test_a_streamed_image_shows_the_classes_that_it_shows_whole(model: Path, procedure: str, presence: str) -> None:
    fit = dict.fromkeys(("weight", "center", "bias", "score_shift", "score_slope", "mask_shift", "mask_slope"), 0.1)
    fit |= {"spread": 1.0, "mean_score": 0.5, "classes": [0, 1, 2, 3], "metric": "dice", "mask_class": [0.0] * 4}
    options = PredictOptions(presence=presence, fit=fit | {"class_bias": [1.0, -3.0, 1.0, 0.0]})
    image = photo(150, 170)
    arguments: dict[str, Any] = {"mode": "sliding", "options": options, "predict": procedure}
    whole = Predictor(model, **arguments)(image)
    streamed = Predictor(model, **arguments, memory=4 * 4 * 48 * 100)(image)
    assert (streamed.labels == whole.labels).mean() > 0.999
    assert (whole.presence is None) == (streamed.presence is None) == (presence != "fitted")
    if presence == "fitted":
        np.testing.assert_allclose(streamed.presence, whole.presence, atol=2e-3)
    if procedure == "rankdice":
        np.testing.assert_allclose(streamed.scores, whole.scores, atol=5e-4)
        assert set(np.unique(whole.labels)) <= set(whole.volumes.nonzero()[0].tolist())


def test_streamed_one_class(one_class: Path) -> None:
    image = photo(150, 100)
    whole = Predictor(one_class, mode="sliding")(image)
    streamed = Predictor(one_class, mode="sliding", memory=4 * 48 * 60)(image)
    assert streamed.volumes[0] == streamed.labels.sum()
    assert (streamed.labels == whole.labels).mean() > 0.999


def test_streaming_knows_what_it_cannot_do(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict = Predictor(model, memory=1000, options=PredictOptions(solver="ba"))
    with pytest.raises(UserError, match="solver 'ba'.*'exact'"):
        predict(photo(100, 100))
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 5}))
    with pytest.raises(UserError, match="TMPDIR"):
        Predictor(model, memory=1000)(photo(100, 100))


def test_a_missing_gpu_is_reported_with_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def no_driver(*size: int, device: torch.device) -> Tensor:
        raise RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU.")

    monkeypatch.setattr(torch, "empty", no_driver)
    with pytest.raises(UserError) as error:
        choose_device("0")
    message = (
        "device 'cuda:0' cannot be used: this machine has the CPU only, no GPU was found; use -d cpu, or leave -d out"
    )
    assert str(error.value) == message


def test_a_segmentation_shows_what_was_found_and_no_array() -> None:
    labels = np.zeros((300, 400), np.uint8)
    labels[5, 5] = 3
    assert repr(Segmentation(labels)) == "Segmentation(300 x 400, labels 0, 3)"
    scores, volumes = np.array([0.91, 0, 0, 0.5], np.float32), np.array([119_999, 0, 0, 1])
    masks = np.zeros((4, 300, 400), bool)
    shown = repr(Segmentation(labels, scores, volumes, masks, torch.zeros(4, 300, 400), tiled=True))
    assert shown == (
        "Segmentation(300 x 400, labels 0, 3, expected scores {0: 0.910, 3: 0.500}, with masks, with probs, tiled)"
    )


def test_numbers_mean_what_they_meant_in_training(model: Path, tmp_path: Path) -> None:
    image = photo(40, 50)
    expected = Predictor(model, mode="single")(image).labels
    scaled = image.astype(np.float32) / 255 * 6000 - 1000
    tifffile.imwrite(tmp_path / "a.tif", scaled, photometric="rgb")
    np.save(tmp_path / "a.npy", scaled)
    kinds = (scaled, torch.from_numpy(scaled).permute(2, 0, 1), tmp_path / "a.tif", tmp_path / "a.npy")
    for kind in kinds:
        with pytest.raises(UserError, match="from -1000 to 5000, expected 0 to 1.*`value_range`"):
            Predictor(model, mode="single")(kind)
    ranged = Predictor(model, mode="single", values=ValueRange.of([-1000, 5000], "nan"))
    for kind in kinds:
        assert (ranged(kind).labels == expected).mean() > 0.999
    scaled[3, 4, 1] = np.nan
    np.testing.assert_array_equal(ranged.read(scaled).image[3, 4], np.float32(ranged.facts.mean))


def test_pillow_images_of_every_mode(model: Path) -> None:
    predict = Predictor(model, mode="single")
    gray = photo(20, 30, 1)[:, :, 0]
    expected = predict.read(gray).image
    for mode in ("L", "RGB", "LA", "RGBA", "P"):
        np.testing.assert_array_equal(predict.read(Image.fromarray(gray).convert(mode)).image, expected, mode)
    wide = Image.fromarray(gray.astype(np.uint16) * 257)
    for picture in (wide, wide.convert("I")):
        np.testing.assert_allclose(predict.read(picture).image, expected / 255, atol=1e-6)
    np.testing.assert_array_equal(predict.read(Image.fromarray(gray > 90)).image[:, :, 0], (gray > 90) * np.uint8(255))


@pytest.mark.parametrize("procedure", ["T", "max", "rankdice"])
def test_pixels_without_data_get_no_class(model: Path, procedure: str) -> None:
    image = photo(40, 50).astype(np.float32)
    missing = np.zeros((40, 50), bool)
    missing[5:20, 10:40] = True
    image[missing] = -9999
    options: dict = {
        "mode": "single",
        "predict": procedure,
        "keep_probs": True,
        "values": ValueRange.of([0, 255], -9999),
    }
    whole = Predictor(model, **options)(image)
    assert (whole.labels[missing] == 255).all()
    assert not whole.probs[:, missing].any()
    if whole.masks is not None:
        assert not whole.masks[:, missing].any()
    if whole.volumes is not None:
        np.testing.assert_array_equal(whole.volumes, whole.masks.sum((1, 2)))
    plain = Predictor(model, mode="single", predict="max")(np.where(missing[..., None], 128, image).astype(np.uint8))
    if procedure == "max":
        assert (whole.labels == plain.labels)[~missing].mean() > 0.5, "other pixels keep their class"
    streamed = Predictor(model, memory=100, max_pixels=64**2, **options)(image)
    assert (streamed.labels[missing] == 255).all()
    for top, band in streamed.probs.bands():
        assert not band[:, missing[top : top + band.shape[1]]].any()
    streamed.probs.close()
