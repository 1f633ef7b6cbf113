"""What a test gathers and writes while it runs: masks, probabilities, and the data of the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import distributed, stamps
from utils.checkpoint import LoadedModel
from utils.evaluation import Decision, Evaluation, Evaluator, Part
from utils.evaluation.boundary import BoundaryIoU
from utils.evaluation.confusion import Confusion, as_csv
from utils.evaluation.reliability import Reliability
from utils.files import write_text
from utils.images.palette import write_mask
from utils.predict import PredictOptions
from utils.predict.files import Index, digest_of_run, file_name, labels_for_png, prepare_folder, write_probs
from utils.report.content import optimism
from utils.report.files import PAGE
from utils.report.gallery import Gallery
from utils.report.page import page


@dataclass
class Recorder:
    """Sees every part of an evaluation, and gathers or writes what is asked for."""

    loaded: LoadedModel
    decisions: Mapping[str, Decision]
    evaluator: Evaluator
    report: bool = False  # gather what report.html shows
    boundary: bool = False  # gather the boundary IoU

    def __post_init__(self) -> None:
        loaded = self.loaded
        facts, classes = loaded.facts, self.evaluator.classes
        self.folders: list[Path] = []
        self._gathered: dict[str, Any] = {}
        if self.report:
            self._gathered["reliability"] = Reliability(facts.num_classes, facts.ignore_index, loaded.activation)
            self._gathered["gallery"] = Gallery(facts, classes or ())
            self._gathered["confusion"] = Confusion(facts.num_classes, facts.ignore_index)
        if self.boundary:
            self._gathered["boundary"] = BoundaryIoU(facts, classes or range(facts.num_classes))
        self._observers: list[Callable[[Part], None]] = [one.add for one in self._gathered.values()]

    def save_masks(self, folder: Path) -> None:
        """Write the label map of every image under every procedure to ``folder/PROCEDURE/NAME.png``."""

        def write(part: Part) -> None:
            for name, decision in self.decisions.items():
                labels = labels_for_png(decision.procedure, part.probs, part.predictions[name], decision.options)
                for image, one in zip(part.batch.names, labels, strict=True):
                    path = folder / name / f"{file_name(image)}.png"
                    write_mask(path, one, self.loaded.facts.palette, stamps.text())

        self._observers.append(write)
        self.folders.append(folder)

    def save_probs(self, folder: Path, options: PredictOptions, procedure: str, force: bool = False) -> None:
        """Keep the probabilities of every image in ``folder``.

        Args:
            folder: see :func:`utils.predict.files.prepare_folder`.
            options, procedure: of the run.
            force: remove the probabilities of an earlier run.
        """
        scored = self.loaded.config.test_loader or self.loaded.config.val_loader
        index = Index(
            facts=self.loaded.facts,
            options=options,
            procedure=self.loaded.config.predict.test if procedure == "all" else procedure,
            temperature=self.evaluator.network.temperature,
            checkpoint=", ".join(map(str, self.loaded.paths)),
            run=digest_of_run(self.loaded.paths, self.evaluator.network),
            data="" if scored is None else f"{scored.type} {json.dumps(scored.args, sort_keys=True)}",
            note=optimism(self.loaded.config) or "",
        )
        prepare_folder(folder, index, force)

        def write(part: Part) -> None:
            for image, probs in zip(part.batch.names, part.probs, strict=True):
                write_probs(folder / f"{file_name(image)}.npz", probs, index.run)

        self._observers.append(write)
        self.folders.append(folder)

    @property
    def on_part(self) -> Callable[[Part], None] | None:
        """What :func:`utils.evaluation.evaluate` calls with each part; None: nothing is asked for."""
        return self._add if self._observers else None

    def _add(self, part: Part) -> None:
        for observe in self._observers:
            observe(part)

    def gather(self) -> None:
        """Merge the results of all processes in the main process."""
        shares = distributed.gather(self._gathered)
        if distributed.is_main():
            for name, one in self._gathered.items():
                one.merge([share[name] for share in shares[1:]])

    def compute(self) -> dict[str, Any]:
        """Return what was gathered for ``results.json``, by name: ``reliability``, ``confusion``, ``boundary``."""
        return {name: one.compute() for name, one in self._gathered.items() if name != "gallery"}

    def write_page(
        self, folder: Path, content: Mapping[str, Any], outcome: Evaluation, command: Sequence[str]
    ) -> list[Path]:
        """Write ``report.html`` and the confusion matrices as CSV; return their paths. Needs ``report``."""
        matrices = self._gathered["confusion"].compute()
        write_text(
            folder / PAGE,
            page(content, outcome.metrics, self._gathered["gallery"], matrices, self.loaded.config, command),
        )
        paths = [folder / PAGE]
        names = self.loaded.facts.label_names
        for name, matrix in matrices.items():
            paths.append(folder / f"confusion_{name}.csv")
            write_text(paths[-1], as_csv(matrix, names))
        return paths
