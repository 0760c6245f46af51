"""An engine that runs somewhere, as a measurement asks it: token ids in, figures out.

Nothing of a text is in any message: an engine's own words may hold the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from moe_serve.errors import ServingError
from moe_serve.serving.logprobs import Place


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """One model behind one URL of the OpenAI-compatible API."""

    url: str
    model: str
    """The name it serves under."""
    length: int | None
    """Tokens of its context, where it says so."""
    client: httpx.Client

    @classmethod
    def at(cls, url: str, client: httpx.Client) -> ServedModel:
        """The first model that an engine lists.

        Raises:
            ServingError: it doesn't answer, or lists none.
        """
        url = url.rstrip("/").removesuffix("/v1")
        try:
            first = _json(url, client, "GET", "/v1/models", None)["data"][0]
            return cls(url=url, model=first["id"], length=first.get("max_model_len"), client=client)
        except (KeyError, TypeError, IndexError) as exc:
            raise ServingError(
                "lists no model",
                where=url,
                remedy="give the address of a vLLM engine that has loaded one",
            ) from exc

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens (vLLM's ``/tokenize``)."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        found = _json(self.url, self.client, "POST", "/tokenize", body)
        try:
            return [int(token) for token in found["tokens"]]
        except (KeyError, TypeError, ValueError) as exc:
            raise ServingError(
                "/tokenize gives no tokens",
                where=self.url,
                remedy="it must be vLLM's own server, with /tokenize",
            ) from exc

    def expect(self, ids: Sequence[int], top: int) -> tuple[Place, ...]:
        """What it expects at each place of ``ids`` but the first.

        Raises:
            ServingError: it doesn't answer, or not with a number for each token.
        """
        body = {"prompt": list(ids), "max_tokens": 1, "prompt_logprobs": top}
        choice = self._complete(body)
        try:
            places = tuple(Place.of(entry, top) for entry in choice["prompt_logprobs"][1:])
        except (LookupError, TypeError, ValueError, AttributeError) as exc:
            raise ServingError(
                "gives no prompt_logprobs",
                where=self.url,
                remedy="it must be vLLM's own server, with prompt_logprobs allowed",
            ) from exc
        if len(places) != len(ids) - 1 or not all(
            place.sound and token in place.listed
            for place, token in zip(places, ids[1:], strict=True)
        ):
            raise ServingError(
                "prompt_logprobs lack a number for a token",
                where=self.url,
                remedy="the engine's log says why",
            )
        if not all(place.complete(top) for place in places):
            raise ServingError(
                f"prompt_logprobs list fewer than the {top} tokens asked for",
                where=self.url,
                remedy="ask for fewer (--top), or start it with a larger --max-logprobs",
            )
        return places

    def go_on(self, prompt: str, tokens: int) -> tuple[tuple[int, ...], str, str]:
        """Greedy continuation: its token ids, its text, and why it ended.

        Raises:
            ServingError: it doesn't answer as it should.
        """
        choice = self._complete({"prompt": prompt, "max_tokens": tokens, "return_token_ids": True})
        try:
            ids = tuple(int(token) for token in choice["token_ids"])
            return ids, str(choice["text"]), str(choice["finish_reason"])
        except (KeyError, TypeError, ValueError) as exc:
            raise ServingError(
                "gives no token_ids", where=self.url, remedy="vLLM 0.10.2 or later does"
            ) from exc

    def text(self, prompt: str, tokens: int, until: Sequence[str]) -> str:
        """Greedy continuation up to where one of ``until`` would begin, without special tokens.

        Raises:
            ServingError: it doesn't answer as it should.
        """
        body = {"prompt": prompt, "max_tokens": tokens, "stop": list(until)}
        choice = self._complete(body | {"add_special_tokens": False})
        try:
            return str(choice["text"])
        except KeyError as exc:
            raise ServingError(
                "answers without a text",
                where=self.url,
                remedy="it must be vLLM's own server; its log may say why",
            ) from exc

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = {"model": self.model, "temperature": 0.0, "seed": 0, **body}
        found = _json(self.url, self.client, "POST", "/v1/completions", asked)
        try:
            choice: dict[str, Any] = found["choices"][0]
        except (KeyError, TypeError, IndexError) as exc:
            raise ServingError(
                "answers without a choice", where=self.url, remedy="the engine's log says why"
            ) from exc
        return choice


def _json(url: str, client: httpx.Client, method: str, path: str, body: object) -> Any:
    """One answer.

    Raises:
        ServingError: none, another status than 200, or no JSON.
    """
    where = f"{url}{path}"
    try:
        answer = client.request(method, where, json=body)
        if answer.status_code != httpx.codes.OK:
            raise ServingError(
                f"answers with status {answer.status_code}",
                where=where,
                remedy="the engine's log says why; for 400 check --max-logprobs and its context",
            )
        return answer.json()
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise ServingError(
            f"no answer ({type(exc).__name__})",
            where=where,
            remedy="see that the engine is up and its address right",
        ) from exc
    except ValueError as exc:
        raise ServingError(
            "answers with something else than JSON",
            where=where,
            remedy="give the address of a vLLM engine, not of a page or a proxy before it",
        ) from exc
