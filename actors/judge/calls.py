"""What passes between the judge's ladder and an engine: plain values, which cross a process as they are.

An engine is anything with `async def ask(request: Request) -> Reply | Failure`. Failures are values, not exceptions:
the ladder decides by their kind.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

# refused: for this call a retry is useless (the prompt is too long); denied: for every call (a wrong key, no model).
FailureKind = Literal["rate_limit", "server_error", "timeout", "closed", "refused", "denied"]


@dataclass(frozen=True)
class Request:
    """One question to the judge: two messages, the JSON schema that constrains the output, its length (tokens)."""

    system: str
    user: str
    schema: dict[str, Any]
    max_tokens: int

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages as chat templates take them."""
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.user}]


def fold_system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return a chat without its system message, whose text is put before that of the user's message after it."""
    if [message["role"] for message in messages[:2]] != ["system", "user"]:
        return messages
    system, user, *rest = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]


@dataclass(frozen=True)
class Reply:
    """The judge's output, and the probabilities of the labels 0-4 at the label's token (None: not offered).

    The probabilities are the model's before any constraint; their sum is the labels' mass. masked: they are from after
    the constraint, which allowed only labels: their ratios are valid, their mass is not.
    """

    text: str
    probabilities: tuple[float, ...] | None = None
    masked: bool = False


@dataclass(frozen=True)
class Failure:
    """Why there is no output, and how long the server asks to wait (s; None: it did not say)."""

    kind: FailureKind
    message: str
    retry_after: float | None = None


JudgeCall = Callable[[Request], Awaitable[Reply | Failure]]  # an engine's `ask`
