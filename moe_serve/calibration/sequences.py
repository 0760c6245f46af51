"""Documents as token sequences without padding, the same for every batch size."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from moe_serve.calibration.texts import Document, Texts
from moe_serve.checkpoint.vocabulary import load_tokenizer
from moe_serve.errors import CalibrationError

_EXCERPT: Final = 128
"""Tokens that one document gives at a time, at least: enough for its kind of text to show."""
MIN_LENGTH: Final = 16
"""A shorter remainder of a domain is left out: it says little and costs a batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequences:
    """Token sequences with their domains. S sequences, T tokens in all."""

    domains: tuple[str, ...]
    tokens: tuple[np.ndarray[Any, np.dtype[np.int64]], ...]
    """One array of token ids per sequence, at most L long."""
    domain: tuple[int, ...]
    """Index into ``domains`` for each sequence."""
    documents: tuple[np.ndarray[Any, np.dtype[np.int64]], ...] = ()
    """For each sequence, which of all documents each of its tokens is from; empty where that is
    not known."""
    corpus: tuple[int, ...] = ()
    """Tokens per domain of the corpus that these are a share of; empty where they are all."""
    balance: tuple[float, ...] = ()
    """Each domain's part of the weight of all tokens; empty where all domains weigh the same."""

    @property
    def total(self) -> int:
        """T."""
        return sum(len(t) for t in self.tokens)

    @property
    def offsets(self) -> tuple[int, ...]:
        """For each sequence, the number of tokens before it."""
        return tuple(int(n) for n in np.cumsum([0, *(len(t) for t in self.tokens)])[:-1])

    def document(self, number: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Of each token of one sequence; a sequence is a document where that is not known."""
        if self.documents:
            return self.documents[number]
        return np.full(len(self.tokens[number]), number, dtype=np.int64)

    def tokens_by_domain(self) -> dict[str, int]:
        """Token counts."""
        counts = dict.fromkeys(self.domains, 0)
        for domain, tokens in zip(self.domain, self.tokens, strict=True):
            counts[self.domains[domain]] += len(tokens)
        return counts

    def weights(self) -> torch.Tensor:
        """Weight of each token, [T], mean 1 over the corpus: domains weigh as the balance says."""
        counts = self._corpus()
        balance = self.balance or (1 / len(counts),) * len(counts)
        sums = [sum(counts) * part for part in balance]
        per_domain = [s / count if count else 0.0 for s, count in zip(sums, counts, strict=True)]
        return torch.tensor(per_domain, dtype=torch.float32)[self.token_domains()]

    def token_domains(self) -> torch.Tensor:
        """Domain index of each token, [T]."""
        lengths = torch.tensor([len(t) for t in self.tokens], dtype=torch.int64)
        return torch.tensor(self.domain, dtype=torch.int64).repeat_interleave(lengths)

    def mask(self, numbers: Container[int]) -> torch.Tensor:
        """Which tokens belong to some sequences, [T]."""
        parts = [torch.full((len(t),), i in numbers) for i, t in enumerate(self.tokens)]
        return torch.cat(parts)

    def batches(self, batch_tokens: int) -> Iterator[tuple[int, ...]]:
        """Indices of consecutive sequences of equal length, at most ``batch_tokens`` tokens."""
        batch: list[int] = []
        for index, tokens in enumerate(self.tokens):
            length = len(tokens)
            full = (len(batch) + 1) * length > batch_tokens
            if batch and (full or len(self.tokens[batch[0]]) != length):
                yield tuple(batch)
                batch = []
            batch.append(index)
        if batch:
            yield tuple(batch)

    def subset(self, numbers: Iterable[int]) -> Sequences:
        """Some of the sequences, in the order given; all domains stay on the list."""
        chosen = tuple(numbers)
        return replace(
            self,
            tokens=tuple(self.tokens[n] for n in chosen),
            domain=tuple(self.domain[n] for n in chosen),
            documents=tuple(self.document(n) for n in chosen),
            corpus=(),
        )

    def cut(self, length: int) -> Sequences:
        """The same tokens in sequences of at most ``length``; short remainders are left out."""
        parts = [
            (part, domain, self.document(number)[start : start + length])
            for number, (tokens, domain) in enumerate(zip(self.tokens, self.domain, strict=True))
            for start in range(0, len(tokens), length)
            if len(part := tokens[start : start + length]) >= min(MIN_LENGTH, len(tokens))
        ]
        tokens, domain, documents = zip(*parts, strict=True)
        return replace(self, tokens=tokens, domain=domain, documents=documents)

    def share(self, numbers: Iterable[int]) -> Sequences:
        """Some of the sequences; each token keeps the weight it has among all."""
        return replace(self.subset(numbers), corpus=self._corpus())

    def _corpus(self) -> tuple[int, ...]:
        return self.corpus or tuple(self.tokens_by_domain().values())

    def sha256(self) -> str:
        """Identifies exactly these tokens in this order."""
        digest = hashlib.sha256(repr(self.domains).encode())
        for domain, tokens in zip(self.domain, self.tokens, strict=True):
            digest.update(f"{domain} {len(tokens)}\n".encode())
            digest.update(tokens.tobytes())
        return digest.hexdigest()

    def held_out(self, share: float) -> torch.Tensor:
        """A share of each domain's sequences, evenly spaced, as a mask over tokens [T].

        At least one of every domain that has two; the last of a domain is among them, for
        neighbours may come from one document.
        """
        count = Counter(self.domain)
        held = {d: min(max(round(share * n), 1), n - 1) for d, n in count.items()}
        seen: Counter[int] = Counter()
        parts = []
        for tokens, domain in zip(self.tokens, self.domain, strict=True):
            before = seen[domain] * held[domain] // count[domain]
            seen[domain] += 1
            apart = seen[domain] * held[domain] // count[domain] > before
            parts.append(torch.full((len(tokens),), apart))
        return torch.cat(parts)


def tokenize(
    texts: Texts,
    model: Path,
    *,
    tokens_per_domain: int,
    length: int,
    vocabulary: int,
    seed: int = 0,
) -> Sequences:
    """Tokenise documents, pack each domain's into sequences of ``length`` tokens.

    A domain's tokens are spread over its documents: every document gives one excerpt before any
    gives a second, in seeded random order, until there are ``tokens_per_domain``. A few documents
    read whole would stand for those documents, not for the domain. Excerpts are joined, a
    document's last by the end-of-text token. The last sequence of a domain may be shorter; there
    is no padding.

    Args:
        texts: what to tokenise.
        model: directory with the tokenizer's files.
        tokens_per_domain: bound on tokens taken from each domain.
        length: L, tokens per sequence.
        vocabulary: the model's vocabulary size; ids must lie below it.
        seed: decides the order of documents and excerpts.

    Raises:
        CalibrationError: no tokenizer, ids beyond the vocabulary, or a domain with hardly a token.
    """
    encode, end = tokenizer(model)
    packed = pack(texts, encode, end, tokens_per_domain, length, seed)
    if (most := max(int(ids.max()) for ids in packed.tokens)) >= vocabulary:
        raise CalibrationError(
            f"the tokenizer yields id {most}, the model knows {vocabulary} tokens",
            where=str(model),
            remedy="copy the tokenizer files that came with these weights",
        )
    return packed


def pack(
    texts: Texts,
    encode: Callable[[str], list[int]],
    end: int | None,
    tokens_per_domain: int,
    length: int,
    seed: int,
) -> Sequences:
    """The same with any tokenizer; ``end`` joins documents, where there is such a token.

    Raises:
        CalibrationError: a domain with hardly a token.
    """
    sequences: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    sources: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    owners: list[int] = []
    for number, domain in enumerate(texts.domains):
        documents = [(n, d) for n, d in enumerate(texts.documents) if d.domain == domain]
        ids, source = _spread(
            documents, encode, end, tokens_per_domain, length, random.Random(f"{seed}/{domain}")
        )
        if len(ids) < MIN_LENGTH:
            raise CalibrationError(
                f"domain {domain!r} has only {len(ids)} tokens",
                where="texts",
                remedy=f"give it at least {MIN_LENGTH}, or merge it into another domain",
            )
        for start in range(0, len(ids), length):
            part = np.asarray(ids[start : start + length], dtype=np.int64)
            if len(part) >= min(MIN_LENGTH, length):
                sequences.append(part)
                sources.append(np.asarray(source[start : start + length], dtype=np.int64))
                owners.append(number)
    return Sequences(
        domains=texts.domains,
        tokens=tuple(sequences),
        domain=tuple(owners),
        documents=tuple(sources),
    )


def _spread(
    documents: list[tuple[int, Document]],
    encode: Callable[[str], list[int]],
    end: int | None,
    tokens: int,
    length: int,
    rng: random.Random,
) -> tuple[list[int], list[int]]:
    """At most ``tokens`` ids, as evenly from the documents as excerpts allow; whose they are."""
    rng.shuffle(documents)
    size = max(1, min(length, max(_EXCERPT, tokens // len(documents))))
    ids: list[int] = []
    source: list[int] = []
    rest: list[tuple[int, list[list[int]]]] = []

    def take(number: int, excerpts: list[list[int]]) -> None:
        excerpt = excerpts.pop()
        ids.extend(excerpt)
        source.extend([number] * len(excerpt))

    for number, document in documents:
        if len(ids) >= tokens:
            break
        whole = encode(document.text) + ([end] if end is not None else [])
        excerpts = [whole[i : i + size] for i in range(0, len(whole), size)]
        rng.shuffle(excerpts)
        take(number, excerpts)
        rest.append((number, excerpts))
    while len(ids) < tokens and any(excerpts for _, excerpts in rest):
        for number, excerpts in rest:
            if excerpts and len(ids) < tokens:
                take(number, excerpts)
    return ids[:tokens], source[:tokens]


def tokenizer(model: Path) -> tuple[Callable[[str], list[int]], int | None]:
    """A model's own: what makes token ids of a text, and its end-of-text token.

    Raises:
        CalibrationError: there is none.
    """
    try:
        found = load_tokenizer(model)
    except Exception as exc:  # transformers and tokenizers raise what they like
        said = str(exc).splitlines() or [type(exc).__name__]
        raise CalibrationError(
            f"no usable tokenizer ({said[0]})",
            where=str(model),
            remedy="copy tokenizer.json and tokenizer_config.json beside config.json",
        ) from exc

    def encode(text: str) -> list[int]:
        ids: list[int] = found(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return encode, found.eos_token_id
