"""What is scored and how, from the procedures to the files: shared by test.py and ``python -m utils.predict``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.checkpoint import LoadedModel
from utils.evaluation import Decision, Evaluation, Evaluator, Limited, all_decisions, evaluate, single_decision
from utils.predict import PredictOptions
from utils.report import content
from utils.report.files import PAGE, to_be_replaced, write, write_scalars
from utils.report.recorder import Recorder
from utils.report.text import text


@dataclass(frozen=True)
class Scoring:
    """One test: a model, data, and the procedures that turn probabilities into masks.

    Attributes:
        procedure: a name in :data:`utils.predict.PROCEDURES`, or "all".
        setting: how, in words.
    """

    loaded: LoadedModel
    loader: Any
    evaluator: Evaluator
    options: PredictOptions
    procedure: str
    setting: content.Setting = content.Setting()

    @property
    def everything(self) -> bool:
        """Whether all procedures are compared."""
        return self.procedure == "all"

    @property
    def decisions(self) -> dict[str, Decision]:
        """The procedures by the names of their results."""
        return all_decisions(self.options) if self.everything else single_decision(self.procedure, self.options)

    def evaluate(
        self,
        title: str,
        recorder: Recorder | None = None,
        limit: int | None = None,
        decisions: Mapping[str, Decision] | None = None,
    ) -> Evaluation:
        """Score all images, or the first ``limit``, under other ``decisions`` than its own if they are given."""
        outcome = evaluate(
            self.evaluator,
            Limited(self.loader, images=limit),
            self.decisions if decisions is None else decisions,
            title=title,
            on_part=recorder.on_part if recorder else None,
            measure_memory=self.everything and recorder is not None,
        )
        if recorder:
            recorder.gather()
        return outcome

    def results(self, outcome: Evaluation, gathered: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the content of ``results.json``; ``gathered``: by a :class:`Recorder`."""
        dataset = self.loader.dataset
        return content.results(outcome, self.loaded, dataset, setting=self.setting, gathered=gathered)

    def report(
        self, outcome: Evaluation, folder: Path | None, details: bool = False, recorder: Recorder | None = None
    ) -> None:
        """Print the scores; write them to ``folder``, with the page if a recorder has gathered what it shows.

        Args:
            outcome: of :meth:`evaluate`.
            folder: of the files; None: none are written.
            details: print all scores of all procedures.
            recorder: that saw the images.
        """
        results = self.results(outcome, recorder.compute() if recorder else None)
        print(text(results, details))
        if folder is None:
            return
        replaced = to_be_replaced(folder, results["protocol"])
        stale = (folder / PAGE).exists()
        written = write(results, outcome, self.loaded.facts, folder)
        if replaced:
            print(f"replaced: {replaced}")
        if recorder and recorder.report:
            written += recorder.write_page(folder, results, outcome, sys.argv)
        elif stale:
            print(f"removed: {folder / PAGE}, from an earlier run; test.py -p all writes a new one")
        if self.loaded.config.tester.tensorboard:
            write_scalars(results, folder)
        for path in [*written, *(recorder.folders if recorder else ())]:
            print(f"written: {path}")
