"""How far a member stands from a searcher: from the records alone.

A searcher's and a member's connections are the ids of members, with spaces between them, under `CONNECTIONS` of `Query.searcher` and of
`Document.attributes`. No prompt shows the ids; the distance is a pair feature.
"""

from jaxsearch.data.records import Document, Query

CONNECTIONS = "connections"


def mutual(query: Query, document: Document) -> int | None:
    """How many connections searcher and member share; None where either has no list of them."""
    mine, theirs = query.searcher.get(CONNECTIONS), document.attributes.get(CONNECTIONS)
    return None if mine is None or theirs is None else len({*mine.split()} & {*theirs.split()})


def distance(query: Query, document: Document) -> int | None:
    """1: the searcher is connected with the member; 2: with a connection of the member; 3: neither. None where either has no list."""
    shared = mutual(query, document)
    if shared is None:
        return None
    if document.id in query.searcher[CONNECTIONS].split():
        return 1
    return 2 if shared else 3
