"""Several GPUs in one process (DataParallel), as far as can be tested without GPUs: replicas, threads, refusals."""

from __future__ import annotations

import copy
import importlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from base import parallel
from models import MODELS
from tests.base.test_trainer import ToyNet, make_trainer
from tests.models.test_models import WITH_AUX, build
from utils import distributed
from utils.errors import UserError


def replica(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Return torch's replica of a network for "another device": one that computes in float64."""

    def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[t.detach().double() if t.is_floating_point() else t.clone() for t in tensors] for _ in devices]

    module = importlib.import_module("torch.nn.parallel.replicate")  # the package has a function of the same name
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    return module.replicate(model, [0], detach=True)[0]


@pytest.mark.parametrize("name", list(MODELS))
def test_replicas_use_nothing_of_the_original(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors outside a network's modules would stay on the first GPU; here they would have another dtype."""
    model = build(name).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        found = replica(distributed.Autocast(model, None), monkeypatch)(x[:1])
        assert torch.equal(found, copy.deepcopy(model).double()(x[:1]))
        if name in WITH_AUX:
            trained = replica(model.train(), monkeypatch)(x)
            assert [y.dtype for y in trained.values()] == [torch.float64] * 2


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_threads_compute_in_the_dtype_of_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amp: str) -> None:
    """Like the threads of DataParallel, which turn autocast on or off, but do not set its dtype."""
    trainer = make_trainer(tmp_path, amp=amp)
    monkeypatch.setattr(distributed, "usable_gpus", lambda n_gpu: 2)
    gpu = torch.device("cuda", 0)
    network = parallel.wrap(trainer.model, trainer.config, gpu)  # without a GPU it passes through to the module
    assert isinstance(network, nn.DataParallel)
    seen: list[Any] = []

    def work() -> None:
        with torch.autocast("cpu", enabled=amp != "off"):
            seen.append(network(torch.zeros(1, 3, 8, 8)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen[0].dtype == {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]
    assert set(trainer.state()["state_dict"]) == set(ToyNet().state_dict())  # no "module." in front


def test_a_compiled_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(distributed, "usable_gpus", lambda n_gpu: 2)
    settings = trainer.settings.model_copy(update={"compile": True})
    config = trainer.config.model_copy(update={"trainer": settings})
    with pytest.raises(UserError, match=r"trainer\.compile.*torchrun --standalone --nproc_per_node 2"):
        parallel.wrap(trainer.model, config, torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("n_gpu", "visible", "expected"),
    [
        (0, "", ""),
        (1, "", ""),
        (2, "", "warning: no GPU found (n_gpu is 2): using the CPU"),
        (1, "3", "warning: no GPU found (CUDA_VISIBLE_DEVICES or -d 3): using the CPU"),
    ],
)
def test_missing_gpus_that_were_chosen_are_reported_once(n_gpu, visible, expected, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert distributed.choose_device(n_gpu) == torch.device("cpu")
    distributed.usable_gpus(n_gpu)
    assert capsys.readouterr().err.strip() == expected
