"""A server of the OpenAI protocol, through the `openai` client: one function that asks it, and what can go wrong.

The key is read from the environment alone, by the name that the client knows, and is never shown.
"""

import ipaddress
import logging
import os
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from dft.errors import UserError
from dft.printable import printable
from dft.secrets import HIDDEN

logger = logging.getLogger(__name__)

KEY, URL = "OPENAI_API_KEY", "OPENAI_BASE_URL"
NO_KEY = "none"  # the client wants one, and servers without keys ignore it
RESERVED_FIELDS = ("model", "messages", "stream", "n")  # of a request
PROBE = [{"role": "user", "content": "Reply with the word yes."}]
SHOWN_DETAIL = 300  # characters of what a server says


class RequestFailed(Exception):
    """A request without a reply, after all retries.

    Args:
        reason: a short name to count by: timeout, no_connection, bad_response, or http_ and the status.
        detail: for people.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Reply:
    """What a server sent.

    Args:
        text: "" where there is none.
        is_cut: the reply ended because it reached the limit of tokens.
        prompt_tokens, completion_tokens: None where the server doesn't count them.
    """

    text: str
    is_cut: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True)
class EndpointConfig:
    """Which server is asked, and how.

    Args:
        model: as the server calls it.
        url: what stands before /chat/completions; None for $OPENAI_BASE_URL, else the client's own.
        temperature: of the replies, at least 0.
        max_tokens: of a reply.
        fields: further ones of each request, or other values of those above; None leaves one out.
        timeout: in seconds, of each try.
        max_retries: after a failure that may pass, with growing pauses; the client's own.
    """

    model: str
    url: str | None = None
    temperature: float = 1.0
    max_tokens: int = 1024
    fields: dict[str, Any] = field(default_factory=dict)
    timeout: float = 120.0
    max_retries: int = 5

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.max_tokens < 1 or self.timeout <= 0 or self.max_retries < 0:
            raise UserError(
                "--temperature and --max_retries must be at least 0, --max_tokens at least 1, and --timeout above 0"
            )
        taken = [name for name in RESERVED_FIELDS if name in self.fields]
        if taken:
            raise UserError(f"--request can't set {taken[0]!r}, which this program sets itself")

    def request_fields(self, seed: int) -> dict[str, Any]:
        """What a request holds beside the model and the messages."""
        own = {"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": seed}
        return {key: value for key, value in (own | self.fields).items() if value is not None}


class Endpoint:
    """A server that is asked for chat completions, from any number of threads.

    Raises:
        UserError: the package openai isn't installed, the URL is none, or neither a URL nor a key is given.
    """

    def __init__(self, config: EndpointConfig):
        self.config = config
        self._openai = _import_openai()
        self._key = os.environ.get(KEY) or None
        url = config.url or os.environ.get(URL) or None
        if url is not None:
            check_url(url, has_key=self._key is not None)
        elif self._key is None:
            raise UserError(
                f"neither an endpoint nor a key is given: name a local server by --endpoint http://127.0.0.1:8000/v1, "
                f"or set the environment variable {KEY}"
            )
        self._client = self._openai.OpenAI(
            api_key=self._key or NO_KEY, base_url=url, timeout=config.timeout, max_retries=config.max_retries
        )
        self.name = printable(self._client.base_url)

    def ask(self, messages: list[dict[str, str]], seed: int) -> Reply:
        """One reply to a conversation.

        Raises:
            RequestFailed: there is none.
        """
        openai = self._openai
        try:
            completion = self._client.chat.completions.create(
                model=self.config.model, messages=messages, extra_body=self.config.request_fields(seed)
            )
        except openai.APITimeoutError as error:
            raise RequestFailed("timeout", f"no reply within {self.config.timeout:g} s") from error
        except openai.APIConnectionError as error:
            raise RequestFailed("no_connection", self._detail(error.__cause__ or error)) from error
        except openai.APIStatusError as error:
            raise RequestFailed(f"http_{error.status_code}", self._detail(error)) from error
        except (openai.OpenAIError, ValueError) as error:  # the latter from a body that is no JSON
            raise RequestFailed("bad_response", self._detail(error)) from error
        if not isinstance(completion, openai.types.chat.ChatCompletion) or not completion.choices:
            raise RequestFailed("bad_response", "the response is not a chat completion")
        return _reply(completion)

    def probe(self) -> None:
        """Asks for one short reply with the settings of all, before many are asked for.

        Raises:
            UserError: there is no reply, with the likely remedy.
        """
        try:
            self.ask(PROBE, seed=0)
        except RequestFailed as error:
            remedy = REMEDIES.get(error.reason, "see what the server says, or try again later")
            raise UserError(
                f"{self.name} gives no reply of the model {printable(self.config.model)} ({error.reason}: "
                f"{error.detail}): {remedy}"
            ) from error

    def _detail(self, error: BaseException) -> str:
        """What an error says, without the key, which a server may repeat."""
        text = str(error) or type(error).__name__
        text = text.replace(self._key, HIDDEN) if self._key else text
        return printable(text[:SHOWN_DETAIL])


REMEDIES = {
    "no_connection": f"start the server, or mend --endpoint or {URL}",
    "timeout": "look whether the server is busy, or give a longer --timeout",
    "bad_response": "mend --endpoint, which must be what stands before /chat/completions, often ending in /v1",
    "http_400": "mend --model, or what the server doesn't take by --temperature, --max_tokens and --request",
    "http_401": f"set the environment variable {KEY} to a key of this server",
    "http_403": f"set the environment variable {KEY} to a key that may use this model",
    "http_404": "mend --model, or --endpoint, which must be what stands before /chat/completions, often ending in /v1",
    "http_422": "leave out what the server doesn't take, such as a seed by --request '{\"seed\": null}'",
    "http_429": "wait, or look at the limits and the credit of the key",
}


def check_url(url: str, has_key: bool) -> None:
    """Warns where a key would be sent without encryption to another machine.

    Raises:
        UserError: the text is no http or https URL, or holds a user name or a password, which would be shown.
    """
    try:
        parts = urlsplit(url)
        host, has_user = parts.hostname, parts.username is not None or parts.password is not None
    except ValueError:
        parts, host, has_user = urlsplit(""), None, False
    if has_user:
        raise UserError(f"the endpoint's URL holds a user name or a password: leave it out, and set {KEY} instead")
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"--endpoint or {URL} is {printable(url)}; it must be a URL such as http://127.0.0.1:8000/v1")
    if has_key and parts.scheme == "http" and not _is_this_machine(host):
        logger.warning("the key goes to %s without encryption: use https, or unset %s if it needs none", host, KEY)


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reply(completion: Any) -> Reply:
    choice, usage = completion.choices[0], completion.usage
    content = choice.message.content if choice.message is not None else None
    return Reply(
        text=content if isinstance(content, str) else "",
        is_cut=choice.finish_reason == "length",
        prompt_tokens=usage.prompt_tokens if usage is not None else None,
        completion_tokens=usage.completion_tokens if usage is not None else None,
    )


def _import_openai() -> Any:
    """The client's package, which only a judge needs, and which takes a second to import."""
    try:
        import openai
        import openai.types.chat
    except ModuleNotFoundError as error:
        raise UserError(
            "a judge is asked through the package openai: pip install -e .[judge] -c constraints.txt"
        ) from error
    return openai
