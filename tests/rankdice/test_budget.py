"""What RankDice costs on a GPU: operations and host waits, counted on a CPU that follows the path of a GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.rankdice.maps import check_masks, odd_rows, smooth_maps
from utils import presence, rankdice
from utils.rankdice import METRICS, label_map, rank_dice
from utils.rankdice.table import upload

VIEWS = {
    "view", "_unsafe_view", "unsqueeze", "squeeze", "expand", "slice", "select", "t", "transpose", "permute",
    "as_strided", "unfold", "split", "split_with_sizes", "unbind", "alias", "detach", "lift_fresh",
}  # fmt: skip
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal"}


class Count(TorchDispatchMode):
    """Counts operations (except views), and how often the host waits: for results, or to copy a list to the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        name = function._overloadpacket.__name__
        if name not in VIEWS:
            self.operations[name] += 1
        by_mask = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
        )
        self.waits += name in WAITS or by_mask
        return function(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> type[Count]:
    for module in (rankdice, rankdice.exact, rankdice.table):
        monkeypatch.setattr(module, "CPU", set())
    tolist = Tensor.tolist

    def waiting(self: Tensor) -> object:
        mode = torch.utils._python_dispatch._get_current_dispatch_mode()
        if isinstance(mode, Count):
            mode.waits += 1
            with torch.utils._python_dispatch._disable_current_modes():
                return tolist(self)
        return tolist(self)

    def copying(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*args: object, **kwargs: object) -> Tensor:
            mode = torch.utils._python_dispatch._get_current_dispatch_mode()
            if isinstance(mode, Count) and sys._getframe(1).f_code is not upload.__code__:
                mode.waits += 1
            return make(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(Tensor, "tolist", waiting)
    monkeypatch.setattr(Tensor, "new_tensor", copying(Tensor.new_tensor))
    monkeypatch.setattr(torch, "tensor", copying(torch.tensor))
    rank_dice(smooth_maps(1, 2, 80, 80))  # the quadrature nodes are computed once
    return Count


@lru_cache
def maps() -> dict[str, Tensor]:
    found = {f"{c} x {h} x {w}": smooth_maps(1, c, h, w) for c, h, w in ((1, 64, 64), (1, 300, 400), (3, 128, 130))}
    found["150 x 80 x 96"] = smooth_maps(1, 150, 80, 96)
    found["8 images"] = smooth_maps(8, 2, 96, 96)
    found["constant"] = torch.full((1, 2, 200, 200), 0.7)
    found["ones"] = torch.ones(2, 1, 352, 352)
    found["plateaus"] = (smooth_maps(1, 3, 120, 120) * 6).round() / 6
    found["noise"] = torch.rand(1, 3, 150, 150, generator=torch.Generator().manual_seed(0))
    found["half"] = smooth_maps(1, 5, 96, 96).half()
    cut = torch.ones(1, 2, 9000)
    cut[:, :, 3000:] = 2**0.5 - 1
    found["cut in a plateau"] = cut.roll(1000, 2)
    generator = torch.Generator().manual_seed(1)
    found["all pixels in doubt"] = 0.45 + 1e-4 * torch.rand(1, 3, 150, 160, generator=generator)
    found["two levels"] = torch.where(torch.rand(1, 3, 150, 160, generator=generator) > 0.5, 1.0, 0.3)
    found["binary"] = (torch.rand(1, 3, 150, 160, generator=generator) > 0.7).float()
    return found


@pytest.mark.parametrize("name", maps())
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("prune", "smooth"), [(0.5, 0.0), (None, 1.0), (0.5, 1.0)])
def test_operations_and_waits(
    as_on_a_gpu: type[Count], name: str, metric: str, prune: float | None, smooth: float
) -> None:
    probs = maps()[name]
    rank_dice(probs, metric, prune=prune, smooth=smooth)  # the sample's places are kept
    with as_on_a_gpu() as count:
        found = rank_dice(probs, metric, prune=prune, smooth=smooth)
    scores_of_empty_masks = bool(prune and smooth)
    assert count.operations.total() <= 100 + 75 * scores_of_empty_masks, count.operations.most_common(12)
    assert count.waits <= 3 + scores_of_empty_masks
    check_masks(probs, found)


def test_the_label_map_on_top(as_on_a_gpu: type[Count]) -> None:
    counted = set()
    for probs in (smooth_maps(1, 21, 64, 64), smooth_maps(2, 150, 72, 90), smooth_maps(1, 2, 200, 200)):
        found = rank_dice(probs, prune=None)
        chosen, _ = presence.choose(found.highest, found.scores)
        with as_on_a_gpu() as count:
            label_map(probs, chosen, found=found)
        assert count.waits == 0
        counted.add(count.operations.total())
    assert len(counted) == 1
    assert counted.pop() <= 110


@pytest.mark.parametrize("solver", ["exact", "rma"])
def test_parts_of_a_map_are_not_copied_if_no_row_is_pruned(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    probs = smooth_maps(1, 5, 90, 100)
    expected = rank_dice(probs, solver=solver, prune=None)
    room = rankdice.exact if solver == "exact" else rankdice.approximations
    solve, places = room.solve, []

    def watched(rows: Tensor, masks: Tensor, **options: object) -> Tensor:
        places.append(rows.data_ptr() - probs.data_ptr())
        return solve(rows, masks, **options)

    monkeypatch.setattr(room, "solve", watched)
    found = rank_dice(probs, solver=solver, prune=None, max_bytes=2 * 4 * 9000)  # two rows at a time
    assert places == [0, 2 * 4 * 9000, 4 * 4 * 9000]
    assert torch.equal(found.masks, expected.masks)
    assert torch.equal(found.volumes, expected.volumes)


class OnDevice(Tensor):
    """A tensor on a device: says which functions were called there."""

    called: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN206
        cls.called.append(function.__name__)
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
            return result.as_subclass(Tensor) if function is Tensor.cpu else result


@pytest.mark.parametrize("how", ["rule", "fitted", "prune", "all"])
def test_presence_is_decided_on_the_cpu(how: str) -> None:
    """Two small copies to the CPU, instead of dozens of operations on the device and a wait per round."""
    highest, scores = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0)).unbind()
    numbers = ("weight", "bias", "center", "spread", "score_shift", "score_slope", "mask_shift", "mask_slope")
    fit = dict.fromkeys(numbers, 0.5) | {"mean_score": 0.6, "class_bias": [0.1] * 5, "mask_class": [0.0] * 5}
    fit |= {"classes": [0, 1, 2, 3, 4], "metric": "iou"}
    options = presence.Options(presence=how, fit=fit, classes=(1, 2, 4))
    expected = presence.choose_classes(highest, scores, options)
    OnDevice.called.clear()
    found = presence.choose_classes(highest.as_subclass(OnDevice), scores.as_subclass(OnDevice), options)
    assert all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(expected, found, strict=True))
    used = [name for name in OnDevice.called if name not in ("__get__", "size", "as_subclass")]
    assert used == ["cpu", "cpu"], used


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_work_as_for_a_gpu_gives_the_masks_of_the_cpu(
    metric: str, smooth: float, request: pytest.FixtureRequest
) -> None:
    probs = torch.cat([smooth_maps(1, 3, 73, 83).flatten(2), odd_rows(73 * 83)], 1)
    expected = rank_dice(probs, metric, smooth=smooth, prune=None)
    request.getfixturevalue("as_on_a_gpu")
    found = rank_dice(probs, metric, smooth=smooth, prune=None)
    assert torch.equal(found.masks, expected.masks)
    assert torch.equal(found.volumes, expected.volumes)
    assert torch.equal(found.cutoffs, expected.cutoffs)
    assert torch.allclose(found.scores, expected.scores, rtol=1e-10, atol=0)


SCRIPT = """
import sys
import torch
from masks.rankdice import label_map, rank_dice
assert "numpy" not in sys.modules or "numpy" in before, "numpy was imported"
probs = torch.rand(2, 3, 80, 90).softmax(1)
found = rank_dice(probs, "iou")
print(label_map(probs).shape, found.masks.shape, sorted(n for n in sys.modules if n.split(".")[0] in ("utils", "base")))
"""


def test_the_folder_works_anywhere(tmp_path: Path) -> None:
    """Copied into another project, the folder needs only torch."""
    shutil.copytree(Path(rankdice.__file__).parent, tmp_path / "masks/rankdice")
    (tmp_path / "masks/__init__.py").touch()
    script = "import torch, sys\nbefore = set(sys.modules)\n" + SCRIPT
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([2, 80, 90]) torch.Size([2, 3, 80, 90]) []"
    for path in (tmp_path / "masks/rankdice").glob("*.py"):
        for line in path.read_text().splitlines():
            if line.strip().startswith(("import ", "from ")):
                module = line.split()[1].split(".")[0]
                assert module in ("", "torch", *sys.stdlib_module_names), (path.name, line)
