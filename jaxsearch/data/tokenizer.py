"""Byte-level BPE: training a small one on a data set's own text, and one wrapper for it and for the tokenizers of checkpoints.

Text from users and documents is encoded with special tokens taken as plain text, so that it can never become a control token; control
tokens enter a prompt by id only.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from jaxsearch.errors import InputError

TINY_CONTROL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
"""Control tokens of a tokenizer trained here; ids 0 to 3."""
LABELS = ("Yes", "No", "0", "1", "2", "3", "4")
"""Answers that a judge or ranker is read at: each must be one token."""
FILE = "tokenizer.json"


class Tokenizer:
    """A `tokenizers.Tokenizer` that keeps text and control apart.

    Args:
      inner: the tokenizer; it is changed so that special tokens inside text are encoded as plain text.
    """

    def __init__(self, inner: tokenizers.Tokenizer):
        # Qwen3 calls <think> and <tool_call> not special, and would make them out of anybody's text.
        marks = [t.content for t in inner.get_added_tokens_decoder().values() if not t.special]
        inner.add_special_tokens(
            [AddedToken(m, normalized=False) for m in marks if m[0] + m[-1] in ("<>", "[]")]
        )
        inner.encode_special_tokens = True
        inner.no_padding()
        inner.no_truncation()
        self.inner = inner

    @property
    def vocab_size(self) -> int:
        """Ids are below this number."""
        return 1 + max(self.inner.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, in one call for all of them; no control token ever comes out."""
        return [e.ids for e in self.inner.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens left out."""
        return self.inner.decode(list(ids), skip_special_tokens=True)

    def cut(self, text: str, limit: int) -> str:
        """The longest start of a text that ends with a whole token and has at most `limit` tokens, at least 1."""
        encoded = self.inner.encode(text, add_special_tokens=False)
        if len(encoded.ids) <= limit:
            return text
        for kept in range(
            limit, 0, -1
        ):  # the last word alone may be other tokens than it was within the text
            start = text[: encoded.offsets[kept - 1][1]].rstrip()
            if len(self.encode([start])[0]) <= limit:
                return start
        return ""

    @property
    def control_ids(self) -> tuple[int, ...]:
        """Every id that no text can be encoded to."""
        added = self.inner.get_added_tokens_decoder()
        return tuple(sorted(index for index, token in added.items() if token.special))

    def control(self, token: str) -> int:
        """The id of a control token.

        Raises:
          InputError: the tokenizer has no such token.
        """
        if (index := self.inner.token_to_id(token)) is None:
            raise InputError(
                f"control token is {token!r}: this tokenizer has none; choose the chat format that fits it"
            )
        return index

    def label(self, text: str) -> int:
        """The id of a one-token answer such as "Yes".

        Raises:
          InputError: the answer is several tokens here.
        """
        (ids,) = self.encode([text])
        if len(ids) != 1:
            raise InputError(f"label is {text!r}: it is {len(ids)} tokens here, answers must be a single one")
        return ids[0]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` into `folder`."""
        target = Path(folder) / FILE
        temporary = target.with_suffix(".tmp")
        self.inner.save(str(temporary))
        os.replace(temporary, target)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
        """Read `tokenizer.json` from `folder` (data only, nothing is executed).

        Raises:
          InputError: it is not there, or damaged.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise InputError(f"{path}: no tokenizer there; a model folder holds {FILE}")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises nothing more specific
            raise InputError(f"{path} is damaged ({error}): copy it again") from error


class CountingTokenizer(Tokenizer):
    """Stands in where lengths alone matter and no tokenizer is at hand: English at 3.5 characters a token, digits one by one.

    (Qwen3's own comes to 4 or more on prompts and policies, so that lengths are rather over than under the truth.)

    Args:
      vocab_size: of the model.
    """

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size

    @property
    def vocab_size(self) -> int:
        """As given."""
        return self._vocab_size

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Zeros, as many as the text has tokens, about."""
        digits = [sum(map(str.isdigit, text)) for text in texts]
        return [[0] * (n + -(-2 * (len(text) - n) // 7)) for n, text in zip(digits, texts, strict=True)]

    def control(self, token: str) -> int:
        """Any id."""
        return 0

    def label(self, text: str) -> int:
        """Any id."""
        return 0

    @property
    def control_ids(self) -> tuple[int, ...]:
        """None."""
        return ()


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A small byte-level BPE: lower case, digits one by one, labels as single tokens; the same texts give the same tokenizer.

    Args:
      texts: what it is trained on.
      vocab_size: at least 256 bytes + control tokens + labels; the result may be smaller where the text is.

    Raises:
      InputError: the vocabulary is too small.
    """
    smallest = 256 + len(TINY_CONTROL) + len(LABELS)
    if vocab_size < smallest:
        raise InputError(
            f"vocab_size is {vocab_size}: use at least {smallest} (all bytes, control tokens, labels)"
        )
    inner = tokenizers.Tokenizer(models.BPE())
    # A word is one token at the start of a text and within it: what a query and a document share is then the same id.
    inner.normalizer = normalizers.Sequence(
        [normalizers.Strip(left=True, right=False), normalizers.Lowercase(), normalizers.Prepend(" ")]
    )
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(LABELS),  # they are added below
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in TINY_CONTROL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    # Whole words only, before anything is normalised: "No" inside "Northwind" stays text.
    inner.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in LABELS])
    return Tokenizer(inner)
