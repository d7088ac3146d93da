"""Finding candidates: BM25, the ScaNN index, the exhaustive search that is its oracle, and the traditional
ranker.

Everything here speaks of documents by their position in the corpus. A result or a candidate list is a pair of
arrays [B, L]: `ids` int32 and `scores` fp32, best first; an empty place holds id -1 and score -inf. Equal
scores are ordered by document position.
"""
