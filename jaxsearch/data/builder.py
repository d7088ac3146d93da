"""What the TFDS builders share: rows are made one by one from numbers or other small keys, here or by workers of Apache Beam.

Apache Beam is an extra (`pip install jaxsearch[beam]`) and is imported only where a pipeline is asked for. Rows and their order are the
same either way.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import tensorflow_datasets as tfds

from jaxsearch.errors import InputError

CHUNK = 64
"""Rows that a worker makes at a time."""
Row = dict[str, Any]
T = TypeVar("T")


class ChunkedBuilder(tfds.core.GeneratorBasedBuilder):
    """A builder whose splits are `self._generate_examples(make_row, keys)`; with Beam where TFDS's download config says so."""

    _with_beam = False

    def _download_and_prepare(
        self, dl_manager: tfds.download.DownloadManager, download_config: tfds.download.DownloadConfig
    ) -> None:
        self._with_beam = bool(download_config.beam_runner or download_config.beam_options)
        super()._download_and_prepare(dl_manager, download_config)

    def _generate_examples(self, make_row: Callable[[T], Row], keys: Sequence[T]) -> Any:
        """Examples of a split: an iterator, or a `beam.PTransform` over chunks of keys.

        Args:
          make_row: of a key; with Beam, what can be pickled (a function of a module, or a `partial` of one).
          keys: small, such as row numbers.
        """
        if not self._with_beam:
            return _examples(make_row, keys)
        import apache_beam as beam

        chunks = [keys[start : start + CHUNK] for start in range(0, len(keys), CHUNK)]
        return beam.Create(chunks) | beam.Reshuffle() | beam.FlatMap(partial(_examples, make_row))


def _examples(make_row: Callable[[T], Row], keys: Iterable[T]) -> Iterator[tuple[str, Row]]:
    for key in keys:
        row = make_row(key)
        yield row.get("id") or row["query_id"], row


def download_config(beam: Sequence[str] | None, **others: Any) -> tfds.download.DownloadConfig:
    """TFDS's config of one preparation.

    Args:
      beam: pipeline options of Apache Beam, such as `["--runner=DirectRunner", "--direct_num_workers=4"]`; None without Beam.
      others: further fields of the config.

    Raises:
      InputError: Apache Beam is asked for and not installed.
    """
    if beam is None:
        return tfds.download.DownloadConfig(**others)
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise InputError(
            f"beam is {list(beam)}, and Apache Beam cannot be imported ({error}): install jaxsearch[beam], see docs/data.md"
        ) from error
    return tfds.download.DownloadConfig(beam_options=PipelineOptions(list(beam)), **others)
