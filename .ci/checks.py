"""What `.ci/run` looks into: an installed wheel (`checks.py wheel CHECKOUT`) and a finished funnel (`checks.py funnel WORKDIR`)."""

import json
import math
import sys
from pathlib import Path

MODELS = ("bm25", "lightgbm", "retriever", "relevance_teacher", "engagement_teacher", "ranker")


def check_wheel(checkout: Path) -> None:
    """The package in use is not the checkout, and has its data and its configs."""
    import jaxsearch
    from jaxsearch.config import load_config
    from jaxsearch.data.facts import occupations

    package = Path(jaxsearch.__file__).resolve().parent
    assert not package.is_relative_to(checkout), f"{package} is the checkout, not the wheel"
    assert load_config("configs/ranker.py:tiny").name == "ranker"
    assert len(occupations()) > 900
    onet = package / "data/onet_jobs"
    wanted = [
        package / "data/job_market/policy_jobs.md",
        package / "data/job_market/policy_people.md",
        package / "measurement/templates/agreement.html",
        onet / "rerank/lists.json",
        onet / "rerank/lists.npz",
    ]
    wanted += [onet / name for name in ("README.md", "CITATIONS.bib", "TAGS.txt")]
    missing = [str(path) for path in wanted if not path.is_file()]
    assert not missing, f"not in the wheel: {', '.join(missing)}"
    assert len(list((onet / "dummy_data").glob("*.txt"))) == 6


def check_funnel(workdir: Path) -> None:
    """The report has every model with finite figures, and every held-out search was ranked."""
    report = json.loads((workdir / "report.json").read_text())
    for name in MODELS:
        row = report["models"][name]
        for figure in ("ndcg@10", "poor_match@10", "items_per_s"):
            assert math.isfinite(row[figure]), f"{name} {figure} is {row[figure]}"
    for name in ("lightgbm", "engagement_teacher", "ranker"):
        assert math.isfinite(report["models"][name]["click_auroc"]), f"{name} has no click_auroc"
    queries = (workdir / "batch/queries.jsonl").read_text().splitlines()
    rankings = (workdir / "batch/rankings.jsonl").read_text().splitlines()
    assert len(queries) == len(rankings) > 0, f"{len(rankings)} of {len(queries)} searches were ranked"
    assert (workdir / "report.png").stat().st_size > 0


if __name__ == "__main__":
    {"wheel": check_wheel, "funnel": check_funnel}[sys.argv[1]](Path(sys.argv[2]).resolve())
