"""The gate before the labelling job: a judge whose agreement with the precedents is too low labels no training data."""

import math
import os
from dataclasses import dataclass
from typing import Literal

from jaxsearch.data.datasets import Dataset
from jaxsearch.data.summary import LEAST_GOLDEN
from jaxsearch.errors import InputError
from jaxsearch.measurement.agreement import AgreementReport, fingerprint, read_report
from jaxsearch.measurement.files import ReportError
from jaxsearch.measurement.judging import Reading, check_reading
from jaxsearch.metrics import Interval
from jaxsearch.models.contract import Model


class GateError(InputError):
    """The judge may not label; the message gives its kappa, the minimum and what to do."""


class StaleReportError(ReportError):
    """The report is of another judge or of other precedents."""


@dataclass(frozen=True)
class AgreementGate:
    """What a judge must reach before it may label.

    Raises:
      InputError: a value is out of range.
    """

    minimum_kappa: float
    """Kappa below which it may not."""
    split: str = "golden"
    """Precedents that it is measured on."""
    weights: Literal["linear", "quadratic"] = "linear"
    """Of the kappa."""
    reading: Reading = "argmax"
    """How its grade is read: "argmax" or "expected"."""
    minimum_queries: int = LEAST_GOLDEN
    """Queries below which a kappa is not believed."""

    def __post_init__(self) -> None:
        if not -1 <= self.minimum_kappa <= 1:
            raise InputError(f"minimum_kappa is {self.minimum_kappa}: use a number from -1 to 1")
        check_reading(self.reading)
        if self.weights not in ("linear", "quadratic"):
            raise InputError(f"weights is {self.weights!r}: use linear or quadratic")
        if self.minimum_queries < 1:
            raise InputError(f"minimum_queries is {self.minimum_queries}: use at least 1")


def check(report: AgreementReport, gate: AgreementGate) -> Interval:
    """The kappa that passes.

    Raises:
      GateError: the kappa is below the minimum or not defined, or of too few queries.
      StaleReportError: the report is of another split.
    """
    if report.split != gate.split:
        raise StaleReportError(
            f"the report is of split {report.split!r}, the gate asks for {gate.split!r}: measure the judge on it"
        )
    found = report.readings[gate.reading].overall
    kappa = found.linear_kappa if gate.weights == "linear" else found.quadratic_kappa
    told = f"{gate.weights}-weighted kappa {kappa.value:.3f} ({_interval(kappa)}) on {found.queries} queries of {report.split}"
    if found.queries < gate.minimum_queries:
        raise GateError(
            f"the judge's {told}: at least {gate.minimum_queries} queries are needed to believe it; add precedents"
        )
    if not kappa.value >= gate.minimum_kappa:
        raise GateError(
            f"the judge's {told} does not reach the gate's minimum of {gate.minimum_kappa:.3f}: it may not label training data. "
            "Train it longer or on more precedents, look at the worst disagreements in agreement.html, or lower minimum_kappa"
        )
    return kappa


def _interval(kappa: Interval) -> str:
    if math.isnan(kappa.low):
        return "no interval"
    return f"95% interval {kappa.low:.3f} to {kappa.high:.3f}"


def check_current(report: AgreementReport, model: Model, data: Dataset) -> None:
    """Raise `StaleReportError` unless the report is of this judge on this data's precedents as they are now."""
    if report.model != model.hash:
        raise StaleReportError(
            f"the agreement report is of judge {report.model[:12]}, this one is {model.hash[:12]}: measure it anew"
        )
    if report.dataset != data.name:
        raise StaleReportError(
            f"the agreement report is of data set {report.dataset!r}, this is {data.name!r}: measure the judge on it"
        )
    if report.fingerprint != fingerprint(data, report.split, report.limit):
        raise StaleReportError(
            f"the precedents in {data.name}, split {report.split!r}, changed since the judge was measured: measure it anew"
        )


def require_agreement(
    folder: str | os.PathLike[str], model: Model, data: Dataset, gate: AgreementGate | None
) -> Interval | None:
    """What a labelling job calls first: the report beside the judge, current and good enough.

    Args:
      folder: the judge's model folder, where `agreement.json` lies.
      model: the judge, as loaded from there.
      data: what is to be labelled.
      gate: what is asked; None: nothing.

    Returns:
      The kappa that passed; None without a gate.

    Raises:
      ReportError: no report, damaged, or stale.
      GateError: the judge may not label.
    """
    if gate is None:
        return None
    report = read_report(folder)
    check_current(report, model, data)
    return check(report, gate)


def gate_of(model: Model, minimum_kappa: float | None = None) -> AgreementGate | None:
    """The gate that a judge's training configuration sets (`JudgeConfig.minimum_kappa`).

    Args:
      model: about to label.
      minimum_kappa: asked for in place of the configuration's; -1: no gate.

    Returns:
      None where there is no gate, or the model is no judge.

    Raises:
      InputError: the minimum is no kappa.
    """
    if model.contract.kind != "judge":
        return None
    task = model.contract.training.get("task", {})
    minimum = task.get("minimum_kappa", -1) if minimum_kappa is None else minimum_kappa
    if isinstance(minimum, bool) or not isinstance(minimum, (int, float)):
        raise InputError(f"minimum_kappa of the judge is {minimum!r}: give a number from -1 to 1")
    if minimum == -1:
        return None
    return AgreementGate(minimum, split=str((task.get("golden") or ["golden"])[0]))
