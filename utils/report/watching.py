"""What looks over the shoulder of a test while it runs: masks, probabilities, reliability, the report's pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import distributed
from utils.checkpoint import LoadedModel
from utils.evaluation import Decision, Evaluation, Evaluator, Part
from utils.evaluation.calibration import Reliability
from utils.files import write_text
from utils.predict import PredictOptions
from utils.predict.stored import Index, ProbsWriter, pictures, write_masks
from utils.report.gallery import Gallery
from utils.report.page import page


class Watcher:
    """Sees every part of an evaluation and keeps what is asked for.

    Args:
        loaded: the model.
        decisions: of the evaluation.
        evaluator: of the evaluation.
        report: gather what ``report.html`` shows.
    """

    def __init__(
        self, loaded: LoadedModel, decisions: Mapping[str, Decision], evaluator: Evaluator, report: bool = False
    ) -> None:
        self.loaded, self.decisions, self.evaluator = loaded, dict(decisions), evaluator
        facts = loaded.facts
        self.reliability = Reliability(facts.num_classes, facts.ignore_index, loaded.activation)
        self.gallery = Gallery(facts, evaluator.classes) if report else None
        self.folders: list[Path] = []
        self._on_part: list[Callable[[Part], None]] = []
        if self.gallery is not None:
            self._on_part += [self.reliability.add, self.gallery.add]

    def save_masks(self, folder: Path) -> None:
        """Write the label map of every image under every procedure to ``folder/PROCEDURE/NAME.png``."""

        def write(part: Part) -> None:
            for name, decision in self.decisions.items():
                labels = pictures(decision.procedure, part.probs, part.predictions[name], decision.options)
                write_masks(folder / name, self.loaded.facts, part.batch.names, labels)

        self._on_part.append(write)
        self.folders.append(folder)

    def save_probs(self, folder: Path, options: PredictOptions, procedure: str) -> None:
        """Keep the probabilities of every image in ``folder``; ``procedure`` is that of the run."""
        index = Index(
            facts=self.loaded.facts,
            options=options,
            procedure=self.loaded.config.predict.test if procedure == "all" else procedure,
            temperature=self.evaluator.network.temperature,
            checkpoint=str(self.loaded.path),
        )
        writer = ProbsWriter(folder, index)
        self._on_part.append(lambda part: writer.write(part.batch.names, part.probs))
        self.folders.append(folder)

    @property
    def watches(self) -> bool:
        """Whether there is anything to look for."""
        return bool(self._on_part)

    def look(self, part: Part) -> None:
        """Look at a part."""
        for look in self._on_part:
            look(part)

    def gather(self) -> None:
        """Bring together, in the main process, what all processes have seen."""
        if self.gallery is None:
            return
        shares = distributed.gather((self.reliability, self.gallery))
        if distributed.is_main():
            self.reliability.merge([share[0] for share in shares[1:]])
            self.gallery.merge([share[1] for share in shares[1:]])

    def write_page(self, path: Path, content: Mapping[str, Any], outcome: Evaluation, command: Sequence[str]) -> Path:
        """Write ``report.html`` and return its path; only after watching with ``report``."""
        if self.gallery is None:
            raise ValueError("a Watcher without report has no pictures for the page")
        write_text(path, page(content, outcome.metrics, self.gallery, self.loaded.config, command))
        return path
