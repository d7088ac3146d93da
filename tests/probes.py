"""What the tests of both generated markets ask: is it the frozen one, what does the policy say, does one side of a pair tell its grade?"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.sparse import csr_matrix, hstack, identity
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from jaxsearch.data.records import Document, Judgment, Query, to_dict


def alone(
    documents: Sequence[Document], queries: Sequence[Query], judgments: Mapping[str, Sequence[Judgment]]
) -> dict[str, float]:
    """AUROC of grade > 2 by logistic regression on one side's words (and which document it is), on the last fifth of the queries."""
    vectorise = HashingVectorizer(n_features=2**13, alternate_sign=False, ngram_range=(1, 2)).transform
    row = {document.id: i for i, document in enumerate(documents)}
    texts = ["; ".join(document.fields.values()) for document in documents]
    numbers = np.array(
        [[len(text) / 100, *d.numeric.values()] for text, d in zip(texts, documents, strict=True)]
    )
    numbers = (numbers - numbers.mean(axis=0)) / numbers.std(axis=0)
    by_document = hstack([vectorise(texts), identity(len(texts)), csr_matrix(numbers)]).tocsr()
    by_query = vectorise([f"{query.text} {query.bucket} {query.searcher['headline']}" for query in queries])
    pairs = np.array(
        [(i, row[j.document_id], j.grade > 2) for i, query in enumerate(queries) for j in judgments[query.id]]
    )
    seen = pairs[:, 0] < 0.8 * len(queries)
    found = {}
    for name, features, column in (("query", by_query, 0), ("document", by_document, 1)):
        model = LogisticRegression(max_iter=100, tol=1e-3).fit(features[pairs[seen, column]], pairs[seen, 2])
        found[name] = roc_auc_score(pairs[~seen, 2], model.decision_function(features[pairs[~seen, column]]))
    return found


def digest(rows: object) -> str:
    """SHA-256 of a table of records."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=to_dict).encode()).hexdigest()


def worked_examples(policy: str) -> list[tuple[str, str, int, str]]:
    """Search, document, grade and reason of every row below a policy's "Worked examples"."""
    rows = re.findall(
        r"^\| ([^|]+) \| ([^|]+) \| (\d) \| ([^|]+) \|$", policy.split("## Worked examples")[1], re.M
    )
    return [(search, document, int(grade), why) for search, document, grade, why in rows]
