"""Configs as the predecessors ship them and keep them in their checkpoints."""

from __future__ import annotations

from typing import Any

# As yassouali/pytorch-segmentation has it.
PUBLISHED: dict[str, Any] = {
    "name": "PSPNet",
    "n_gpu": 1,
    "use_synch_bn": True,
    "arch": {
        "type": "PSPNet",
        "args": {"backbone": "resnet50", "freeze_bn": False, "freeze_backbone": False},
    },
    "train_loader": {
        "type": "VOC",
        "args": {
            "data_dir": "data",
            "batch_size": 8,
            "base_size": 400,
            "crop_size": 380,
            "augment": True,
            "shuffle": True,
            "scale": True,
            "flip": True,
            "rotate": True,
            "blur": False,
            "split": "train_aug",
            "num_workers": 8,
        },
    },
    "val_loader": {
        "type": "VOC",
        "args": {
            "data_dir": "data",
            "batch_size": 8,
            "crop_size": 480,
            "val": True,
            "split": "val",
            "num_workers": 4,
        },
    },
    "optimizer": {
        "type": "SGD",
        "differential_lr": True,
        "args": {"lr": 0.01, "weight_decay": 1e-4, "momentum": 0.9},
    },
    "loss": "CrossEntropyLoss2d",
    "ignore_index": 255,
    "lr_scheduler": {"type": "Poly", "args": {}},
    "trainer": {
        "epochs": 80,
        "save_dir": "saved/",
        "save_period": 10,
        "monitor": "max Mean_IoU",
        "early_stop": 10,
        "tensorboard": True,
        "log_dir": "saved/runs",
        "log_per_iter": 20,
        "val": True,
        "val_per_epochs": 5,
    },
}

# As the fork of the RankSEG paper has it: a test loader, prediction procedures, a tester.
RANKSEG: dict[str, Any] = PUBLISHED | {
    "name": "FCN8",
    "arch": {
        "type": "FCN8",
        "args": {"backbone": "resnet101", "freeze_bn": False, "freeze_backbone": False},
    },
    "train_loader": {
        "type": "CityScapes",
        "args": {
            "data_dir": "data",
            "mode": "fine",
            "split": "train",
            "batch_size": 8,
            "base_size": 1024,
            "crop_size": 512,
            "augment": True,
            "shuffle": True,
            "scale": True,
            "flip": True,
            "rotate": True,
            "blur": True,
            "num_workers": 8,
        },
    },
    "val_loader": {
        "type": "CityScapes",
        "args": {"data_dir": "data", "mode": "fine", "split": "val", "batch_size": 8, "crop_size": 512, "val": True},
    },
    "test_loader": {
        "type": "CityScapes",
        "args": {"data_dir": "data", "mode": "fine", "split": "val", "batch_size": 1, "val": True, "crop_size": 512},
    },
    "loss": "BCEWithLogitsLoss2d",
    "predict": {"CoI": [0, 11, 13], "train": "max", "val": "T", "test": "rankdice"},
    "tester": {"tensorboard": True, "out_dir": None},
}
