"""Command line of data: `validate` files of one's own (every bad record is named, nothing is changed), `prepare` a built data set."""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxsearch.data.jsonl import printable
from jaxsearch.data.summary import Summary
from jaxsearch.data.user_data import KINDS, Report, find_files, kind_of, read_files
from jaxsearch.errors import InputError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jaxsearch.data", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    validate = commands.add_parser(
        "validate",
        allow_abbrev=False,
        help="check a folder, or single files together",
        description="Exit status: 0 all is well, 1 there are bad records, 2 something cannot be read at all.",
    )
    validate.add_argument("paths", nargs="+", metavar="FOLDER_OR_FILE")
    validate.add_argument("--json", default="", help="write the report to this file too")
    validate.add_argument(
        "--show", type=int, default=20, help="bad records shown (default 20; all are counted)"
    )
    validate.add_argument(
        "--max-bad-share", type=float, default=0.0, help="bad records, as a share of each kind, that are well (default 0)"
    )  # fmt: skip
    prepare = commands.add_parser(
        "prepare",
        allow_abbrev=False,
        help="build a data set, here or by the workers of Apache Beam",
        description="What stands behind --beam goes to Apache Beam as its pipeline options, such as --runner=DirectRunner. Rows and "
        "their order are the same with and without.",
    )
    prepare.add_argument("dataset", help="job_market:VARIANT or onet_jobs (with ONET_DIR)")
    prepare.add_argument("--data-dir", help="default: TFDS's own; with Beam, a folder that all workers reach")
    prepare.add_argument("--beam", nargs=argparse.REMAINDER, metavar="OPTION")
    return parser


def validate(paths: Sequence[str]) -> tuple[Report, Summary]:
    """Read one folder, or files that belong together, and tell what they hold.

    Raises:
      InputError: several folders at once, or a file whose name does not tell what it holds.
    """
    summary = Summary()
    if len(paths) == 1 and not (Path(paths[0]).is_file() or kind_of(Path(paths[0]))):
        files, report = find_files(paths[0])
        return read_files(files, report, summary.add, Path(paths[0])), summary
    files = {}
    for path in map(Path, paths):
        if path.is_dir():
            raise InputError(f"{path} is a folder: validate one folder at a time, or files")
        if not kind_of(path):
            names = ", ".join(f"{kind}.jsonl" for kind in KINDS)
            raise InputError(f"{path}: name files by what they hold: {names} (or .parquet, or {next(iter(KINDS))}-1.jsonl)")  # fmt: skip
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        files.setdefault(kind_of(path), []).append(path)
    return read_files(files, Report(), summary.add), summary


def warnings(report: Report, summary: Summary) -> list[str]:
    """What is no error and will hurt all the same. Parts of a folder are not blamed for the parts that are not there."""
    found = summary.warnings() if report.accepted["documents"] and report.accepted["queries"] else []
    if report.repeated_judgments:
        found.append(f"{report.repeated_judgments} judgments repeat another with the same grade")
    if report.not_read:
        shown = ", ".join(report.not_read[:10])
        found.append(f"{len(report.not_read)} files were not read, their names are none of ours: {shown}")
    return found


def to_text(report: Report, summary: Summary, show: int) -> str:
    """The report for people."""
    lines = []
    for name, (accepted, rejected) in report.files.items():
        lines.append(f"{name}: {accepted:,} good records, {rejected:,} bad")
    lines += ["", summary.text()]
    if notes := warnings(report, summary):
        lines += ["", "Worth knowing", *(f"  {note}" for note in notes)]
    if report.unreadable:
        lines += ["", f"Cannot be read ({len(report.unreadable)})"]
        lines += [f"  {problem}" for problem in report.unreadable[:show]]
    if total := report.rejected.total():
        lines += ["", f"Bad records ({total:,})"]
        lines += [f"  {n:,} {reason}" for reason, n in report.reasons.most_common()]
        lines += ["", *(f"  {problem}" for problem in report.problems[:show])]
        if total > show:
            lines.append(f"  and {total - min(show, len(report.problems)):,} more")
    if not total and not report.unreadable:
        lines += ["", "Every record is good."]
    return "\n".join(lines)


def to_json(report: Report, summary: Summary) -> dict[str, Any]:
    """The report as plain JSON values."""

    def counted(counts: Counter[str]) -> dict[str, int]:
        return dict(counts.most_common())

    return {
        "files": {name: {"accepted": good, "rejected": bad} for name, (good, bad) in report.files.items()},
        "accepted": counted(report.accepted),
        "rejected": counted(report.rejected),
        "reasons": counted(report.reasons),
        "problems": [
            {"file": file, "line": line, "field": bad.field, "value": bad.value, "code": bad.code, "reason": bad.reason}
            for file, line, bad in [*report.unreadable, *report.problems]
        ],
        "not_read": report.not_read,
        "warnings": warnings(report, summary),
        "summary": summary.figures(),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, 1 (bad records) or 2 (input that cannot be read at all)."""
    options = _parser().parse_args(argv)
    try:
        if options.command == "prepare":
            return _prepare(options.dataset, options.data_dir, options.beam)
        if not 0 <= options.max_bad_share < 1:
            raise InputError(f"--max-bad-share is {options.max_bad_share}: use at least 0 and less than 1")
        report, summary = validate(options.paths)
        print(to_text(report, summary, max(options.show, 0)))
        if options.json:
            _write(Path(options.json), json.dumps(to_json(report, summary), indent=2))
    except (InputError, OSError) as error:
        print(f"jaxsearch.data: {printable(str(error), 500)}", file=sys.stderr)
        return 2
    if report.unreadable:
        return 2
    return 1 if report.worst_share() > options.max_bad_share else 0


def _prepare(name: str, data_dir: str | None, beam: list[str] | None) -> int:
    from jaxsearch.data.datasets import prepare_dataset  # TFDS, which `validate` does without

    for table, splits in prepare_dataset(name, data_dir, beam).items():
        print(
            f"{table:<12} {sum(splits.values()):,} ({', '.join(f'{split} {n:,}' for split, n in splits.items())})"
        )
    return 0


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
