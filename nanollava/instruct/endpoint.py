"""A teacher behind any OpenAI-compatible endpoint, through the `openai` library (extra [teacher]).

The key comes from OPENAI_API_KEY alone. It goes to the endpoint and nowhere else: not into a file, a message, a name.
"""

import ipaddress
import os
import random
import time
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from urllib.parse import urlsplit

from nanollava.error import Error, first_line, printable
from nanollava.instruct.teacher import Reply, Request, Teacher, Unanswered, tokens_in

KEY = "OPENAI_API_KEY"
LONGEST_PAUSE = 60.0  # seconds between two attempts, where the endpoint names no time
LONGEST_WAIT = 600.0  # seconds that an endpoint may ask for
FILTERED = "the endpoint's content filter held it back"
BROKEN = "the answer was cut off or not in the chat-completions format"


class Later(Exception):
    """An attempt failed in a way that another one may mend, after ``wait`` seconds if the endpoint said so."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class EndpointTeacher(Teacher):
    """``retries`` repetitions of what failed, the first after about ``pause`` seconds, each next after twice as long.

    temperature: None leaves it to the endpoint. Raises Error without the library, without a key where one is needed,
    and for an address that is none.
    """

    at_once = 1_000

    def __init__(
        self,
        model: str,
        base_url: str,
        temperature: float | None = None,
        max_tokens: int = 1024,
        timeout: float = 120.0,
        retries: int = 8,
        pause: float = 1.0,
    ):
        self.library, self.key, address = library(), read_key(base_url), urlsplit(base_url)
        self.name = f"{model} at {address.hostname}{f':{address.port}' if address.port else ''}"
        self.model, self.temperature, self.max_tokens = model, temperature, max_tokens
        self.retries, self.pause, self.timeout = retries, pause, timeout
        self.limit = "max_tokens"  # what the endpoint calls the longest answer; newer models know another name
        try:  # repetitions are ours: the library does not repeat what came as half an answer
            fields = {"api_key": self.key or "none", "base_url": base_url, "timeout": timeout, "max_retries": 0}
            self.client = self.library.OpenAI(**fields)
        except Exception as error:  # of several libraries, for the address, or for a proxy that the environment names
            reason = printable(self.hide(first_line(error)), 200)
            raise Error(f"--base-url {self.name}: cannot be used ({reason}); mend it, or the proxy settings") from error

    def ask(self, request: Request) -> Reply:
        """Raises Error and Unanswered as ``Teacher`` does."""
        for attempt in range(self.retries + 1):
            try:
                reply, self.trouble = self.attempt(request), ""
                return reply
            except Later as later:
                self.trouble = reason = str(later)
                if attempt < self.retries:
                    time.sleep(self.pause_before(attempt + 1, later.wait))
        raise Unanswered(f"{reason}, {self.retries + 1} times" if self.retries else reason)

    def pause_before(self, attempt: int, wanted: float | None) -> float:
        """Seconds: what the endpoint wants and a little more, or twice the pause before; by chance shorter or longer,
        so that requests that failed together do not come together again."""
        if wanted is not None:
            return wanted + self.pause * random.random()
        return min(LONGEST_PAUSE, self.pause * 2.0 ** min(attempt - 1, 99)) * random.uniform(0.5, 1.0)

    def attempt(self, request: Request) -> Reply:
        """One request, one reply. Raises Error, Unanswered, or Later."""
        limit, warmth = self.limit, {} if self.temperature is None else {"temperature": self.temperature}
        fields = {"model": self.model, "messages": request.messages, limit: self.max_tokens} | warmth
        try:
            answer = self.client.chat.completions.create(**fields)
        except self.library.APIStatusError as error:
            if self.renamed(error, limit):
                return self.attempt(request)
            raise self.refusal(error) from None  # its own words may hold the key
        except self.library.APITimeoutError:
            raise Later(f"no answer within {self.timeout:g} s") from None
        except self.library.APIConnectionError as error:
            reason = first_line(error.__cause__ or error)
            raise Later(f"no connection, or it broke ({printable(self.hide(reason), 100)})") from None
        except (self.library.OpenAIError, ValueError, RecursionError):  # the last two: JSON cut off, or nested deeply
            raise Later(BROKEN) from None
        return self.read(answer)

    def read(self, answer: object) -> Reply:
        """The reply in an answer of the library's. Raises Later where there is none."""
        try:
            choice, usage = answer.choices[0], answer.usage
            text, cut = choice.message.content or "", choice.finish_reason == "length"
            refused = FILTERED if choice.finish_reason == "content_filter" else ""
        except (AttributeError, LookupError, TypeError):
            raise Later(BROKEN) from None
        if not isinstance(text, str):
            raise Later(BROKEN)
        tokens = (tokens_in(getattr(usage, f"{name}_tokens", 0)) for name in ("prompt", "completion"))
        return Reply(self.hide(text), *tokens, cut, refused)

    def renamed(self, error: Exception, limit: str) -> bool:
        """Whether an endpoint refuses ``limit`` because it knows it by the newer name, which is taken from now on."""
        if limit != "max_tokens" or "max_completion_tokens" not in str(error):
            return False
        self.limit = "max_completion_tokens"
        return True

    def refusal(self, error: Exception) -> Exception:
        """What to make of an answer with a status of 300 or more."""
        status = error.status_code
        what = f"{status} {HTTPStatus(status).phrase}" if status in set(HTTPStatus) else str(status)
        if status in (401, 403):
            return Error(f"{self.name}: refuses the key ({what}); set {KEY} to one that may use this model")
        said = f"{what}: {printable(self.hide(first_line(error)), 300)}"
        if status == 404:
            return Error(f"{self.name}: {said}; check --teacher-model and --base-url")
        if error.code == "insufficient_quota":
            return Error(f"{self.name}: {what}, no quota is left; raise it, then give the same command again")
        if status in (408, 409, 429) or status >= 500:
            wait = seconds_to_wait(error.response.headers)
            return (
                Unanswered(f"{what}, to be asked in {wait:.0f} s") if (wait or 0) > LONGEST_WAIT else Later(what, wait)
            )
        return Unanswered(said, for_good=status in (400, 413, 422))

    def hide(self, text: str) -> str:
        """The text without the key, should an endpoint send it back."""
        return text.replace(self.key, "[key]") if self.key else text


def library():
    """The `openai` library. Raises Error where it is not installed."""
    try:
        import openai
    except ImportError as error:
        raise Error('--teacher endpoint needs the openai library: pip install -e ".[teacher]"') from error
    return openai


def read_key(base_url: str) -> str:
    """The key for an endpoint; "" where there is none and the endpoint is a local one. Raises Error otherwise."""
    try:
        parts = urlsplit(base_url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = None, None
    plain = base_url.isprintable() and " " not in base_url
    if not host or not plain or parts.scheme not in ("http", "https"):
        raise Error(f"--base-url {printable(base_url)}: give one like http://localhost:8000/v1")
    key = os.environ.get(KEY, "").strip()
    if not key and not is_local(host):
        raise Error(f"{KEY} is not set: {host} needs a key, which is read from this environment variable alone")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise Error(f"{KEY}: holds spaces or signs that no key has; copy it again")
    return key


def is_local(host: str) -> bool:
    """Whether a host is this machine or one of the same network."""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return host == "localhost" or host.endswith((".localhost", ".local"))


def seconds_to_wait(headers) -> float | None:
    """What Retry-After says, in seconds or as a date (RFC 9110, section 10.2.3); None without a sensible one."""
    value = headers.get("retry-after")
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError, AttributeError):
            return None
    return max(0.0, seconds) if seconds == seconds else None
