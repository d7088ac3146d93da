"""What a set of records holds, in figures, and what about it will hurt training or measuring."""

import statistics
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from jaxsearch.data.records import ACTIONS, Document, Impression, Judgment, Query, Record

RELEVANT = 3
"""The lowest grade that counts as relevant (the threshold of P@k)."""
LEAST_GOLDEN = 10
"""Judged golden queries below which the gate lets no judge label (default of `measurement.gate.AgreementGate`)."""
LONG_DOCUMENT = 700
"""Words that about fill the 1,024 tokens of a full-size prompt; `:tiny` models read far less."""


@dataclass
class Summary:
    """Figures over records; `add` takes them in any order. Memory: ids and lengths, no texts."""

    lengths: array = field(default_factory=lambda: array("I"))
    """Words of each document."""
    verticals: Counter[str] = field(default_factory=Counter)
    """Documents by vertical."""
    splits: dict[str, str] = field(default_factory=dict)
    """Query id -> split."""
    buckets: Counter[str] = field(default_factory=Counter)
    grades: Counter[int] = field(default_factory=Counter)
    best: dict[str, int] = field(default_factory=dict)
    """Query id -> its best grade."""
    eligible: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(vertical, action) -> impressions where it was possible."""
    done: Counter[tuple[str, str]] = field(default_factory=Counter)
    impressions: Counter[str] = field(default_factory=Counter)
    """By vertical."""
    shown: set[str] = field(default_factory=set)
    """Ids of queries with impressions."""
    _texts: dict[tuple[str, int], set[str]] = field(default_factory=lambda: defaultdict(set))

    def add(self, record: Record, split: str = "") -> None:
        """Count one record; `split` is a query's."""
        match record:
            case Document():
                self.lengths.append(sum(len(text.split()) for text in record.fields.values()))
                self.verticals[record.vertical] += 1
            case Query():
                self.splits[record.id] = split
                self.buckets[record.bucket] += 1
                self._texts[record.vertical, hash(" ".join(record.text.lower().split()))].add(split)
            case Judgment():
                self.grades[record.grade] += 1
                self.best[record.query_id] = max(record.grade, self.best.get(record.query_id, 0))
            case Impression():
                self.impressions[record.vertical] += 1
                self.shown.add(record.query_id)
                for action, value in record.actions.items():
                    if value is not None:
                        self.eligible[record.vertical, action] += 1
                        self.done[record.vertical, action] += value

    def figures(self) -> dict[str, Any]:
        """As plain JSON values."""
        lengths = sorted(self.lengths)
        sizes = Counter(self.splits.values())
        # Precedents only where there are some: most data has none.
        splits = ["train", "dev", "test", *(split for split in ("calibration", "golden") if sizes[split])]
        judged = Counter(split for query, split in self.splits.items() if query in self.best)
        relevant = Counter(
            split for query, split in self.splits.items() if self.best.get(query, 0) >= RELEVANT
        )
        return {
            "documents": len(lengths),
            "verticals": dict(sorted(self.verticals.items())),
            "words": {
                "least": lengths[0],
                "median": statistics.median(lengths),
                "most": lengths[-1],
            }
            if lengths
            else {},
            "queries": {split: sizes[split] for split in splits},
            "judged_queries": {split: judged[split] for split in splits},
            "queries_with_relevant": {split: relevant[split] for split in splits},
            "buckets": dict(sorted(self.buckets.items())),
            "judgments": self.grades.total(),
            "grades": {str(grade): self.grades[grade] for grade in range(5)},
            "impressions": dict(sorted(self.impressions.items())),
            "queries_with_impressions": len(self.shown),
            "actions": {
                vertical: {
                    action: {
                        "eligible": (n := self.eligible[vertical, action]),
                        "rate": self.done[vertical, action] / n if n else None,
                    }
                    for action in ACTIONS[vertical]
                }
                for vertical in ACTIONS
                if self.impressions[vertical]
            },
        }

    def warnings(self) -> list[str]:
        """What will hurt, most important first."""
        figures = self.figures()
        return [*self._query_warnings(figures), *self._document_warnings(figures), *self._action_warnings()]

    def _query_warnings(self, figures: dict[str, Any]) -> list[str]:
        found = []
        uses = {
            "train": "nothing can be trained",
            "dev": "no stage can be watched while it trains",
            "test": "nothing can be measured",
        }
        for split, use in uses.items():
            count = figures["queries"][split]
            if not count:
                found.append(f"no {split} queries: {use}")
                continue
            judged, relevant = figures["judged_queries"][split], figures["queries_with_relevant"][split]
            if split == "train" and not judged:
                found.append("no judged train queries: no judge can be trained, label with one that exists")
            if split != "train" and judged < count:
                found.append(f"{count - judged} of {count} {split} queries have no judgment: they are not measured")  # fmt: skip
            if judged and relevant < judged:
                found.append(
                    f"{judged - relevant} of {judged} judged {split} queries have no document of grade {RELEVANT} or more"
                )
        golden = figures["judged_queries"].get("golden", 0)
        if figures["judged_queries"]["train"] and golden < LEAST_GOLDEN:
            found.append(
                f"{golden} judged golden queries, {LEAST_GOLDEN} are needed: "
                "a judge trained here labels only where `--minimum-kappa -1` lets it"
            )
        twice = sum(len(splits) > 1 for splits in self._texts.values())
        if twice:
            found.append(f"{twice} query texts occur in more than one split: measured figures flatter")
        if self.buckets[""]:
            found.append(f"{self.buckets['']} queries have no bucket: figures per bucket leave them out")
        return found

    def _document_warnings(self, figures: dict[str, Any]) -> list[str]:
        found = []
        if long := sum(words > LONG_DOCUMENT for words in self.lengths):
            found.append(
                f"{long} documents have more than {LONG_DOCUMENT} words: models read their beginning"
            )
        if short := sum(words < 3 for words in self.lengths):
            found.append(f"{short} documents have fewer than 3 words")
        if len(figures["verticals"]) > 1:
            found.append("documents of two verticals: one is trained on at a time")
        if self.grades.total() and len([n for n in self.grades.values() if n]) == 1:
            found.append("all judgments have one grade: nothing can be learned from them")
        return found

    def _action_warnings(self) -> list[str]:
        if not self.impressions:
            return ["no impressions: no engagement teacher can be trained"]
        return [
            f"{vertical}: no {action} in {self.impressions[vertical]} impressions: it cannot be learned"
            for vertical, actions in ACTIONS.items()
            if self.impressions[vertical]
            for action in actions
            if not self.done[vertical, action]
        ]

    def text(self) -> str:
        """A few readable lines."""
        figures = self.figures()
        lines = [f"documents    {figures['documents']:,} ({_counts(figures['verticals'])})"]
        if words := figures["words"]:
            lines.append(f"  words      {words['least']:,} to {words['most']:,}, median {words['median']:,g}")
        queries = figures["queries"]
        lines.append(f"queries      {sum(queries.values()):,} ({_counts(queries)})")
        named = {bucket or "(none)": n for bucket, n in figures["buckets"].items()}
        lines.append(f"  buckets    {_counts(dict(list(named.items())[:20]))}")
        judged = [
            f"{split} {figures['judged_queries'][split] / n:.0%} "
            f"({figures['queries_with_relevant'][split] / n:.0%} with a grade of {RELEVANT} or more)"
            for split, n in queries.items()
            if n
        ]
        lines.append(f"  judged     {', '.join(judged)}")
        lines.append(f"judgments    {figures['judgments']:,} (grade {_counts(figures['grades'], ': ')})")
        lines.append(
            f"impressions  {sum(figures['impressions'].values()):,} ({_counts(figures['impressions'])})"
        )
        for vertical, actions in figures["actions"].items():
            rates = ", ".join(
                f"{action} {'-' if told['rate'] is None else format(told['rate'], '.2%')}"
                for action, told in actions.items()
            )
            lines.append(f"  {vertical:<10} {rates}")
        return "\n".join(lines)


def _counts(counts: dict[str, int], between: str = " ") -> str:
    return ", ".join(f"{name}{between}{n:,}" for name, n in counts.items()) or "none"
