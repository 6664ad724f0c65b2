"""What clients send and get: bodies of OpenAI's chat completions, read strictly. What would change an answer and is not
done here is refused in a sentence, never ignored."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlmfix.asking.conversation import Conversation
from vlmfix.asking.pictures import open_picture

MAX_PIXELS = 40_000_000
"""Of a picture."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Others have decoders that are seldom looked at, or start programs."""
MAX_PICTURES = 16
"""Of a request."""
MAX_TEXT = 60_000
"""Characters of a request's messages."""
MAX_NEW_TOKENS = 4096
MAX_ANSWERS = 8
"""The largest `n`."""


class Refused(ValueError):
    """A request that is not answered, with OpenAI's code of the kind of fault."""

    def __init__(self, sentence: str, status: int = 400, kind: str = "invalid_request_error") -> None:
        super().__init__(sentence)
        self.status, self.kind = status, kind

    def body(self) -> dict[str, Any]:
        """OpenAI's form of an error."""
        return {"error": {"message": str(self), "type": self.kind, "param": None, "code": None}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ImageURL(_Strict):
    """Where a picture is: here always in the URL itself."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class TextPart(_Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageURL


class Message(_Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = None


class StreamOptions(_Strict):
    """`include_usage`: a last chunk that counts tokens."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(_Strict):
    """Text; nothing constrains an answer here."""

    type: Literal["text"]


Number = Annotated[float, Field(allow_inf_nan=False)]


class ChatRequest(_Strict):
    """The body of `/v1/chat/completions`. Greedy decoding unless `temperature` is above 0."""

    model: str = Field(max_length=2000)
    messages: list[Message] = Field(min_length=1, max_length=200)
    max_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=1000)]
        | list[Annotated[str, Field(min_length=1, max_length=1000)]]
        | None
    ) = Field(default=None, max_length=1000)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    # Neutral values are taken, others refused: they would change the answer.
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    # These say nothing about the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None


@dataclass(frozen=True)
class Asked:
    """A request, opened."""

    model: str
    conversation: Conversation
    images: list[tuple[str, Image.Image]]
    """Hash of the bytes that came, and the picture."""
    settings: dict[str, Any]
    """Of `generate`."""
    seed: int | None
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    top_logprobs: int | None
    """`None`: no log-probabilities."""
    id: str = field(default_factory=lambda: "chatcmpl-" + uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))


def read_request(body: bytes) -> Asked:
    """A request from its bytes. `Refused` says in a sentence what is wrong with it."""
    try:
        data = json.loads(body)
        json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is no JSON text: {str(error)[:200]}") from None
    try:
        request = ChatRequest.model_validate(data)
    except ValidationError as error:
        raise Refused(_sentence(error)) from None
    conversation, images = _conversation(request.messages)
    settings: dict[str, Any] = {"max_new_tokens": request.max_completion_tokens or request.max_tokens or 256}
    if request.temperature:
        settings |= {"do_sample": True, "temperature": max(request.temperature, 1e-3), "top_k": request.top_k or 0}
        settings["top_p"] = request.top_p or 1.0
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stop) > 16:
        raise Refused(f"stop: expected up to 16 texts, got {len(stop)}")
    return Asked(
        model=request.model,
        conversation=conversation,
        images=images,
        settings=settings,
        seed=request.seed if request.temperature else None,
        n=request.n or 1,
        stop=tuple(stop),
        stream=bool(request.stream),
        include_usage=request.stream_options is not None and request.stream_options.include_usage,
        top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])[:200] or "the body"
    if first["type"] == "extra_forbidden":
        return f"{place}: this server does not know it, and ignores nothing that could change an answer; leave it out"
    return f"{place}: {first['msg']}, got {str(first['input'])[:100]!r}"


def _conversation(messages: list[Message]) -> tuple[Conversation, list[tuple[str, Image.Image]]]:
    images: list[tuple[str, Image.Image]] = []
    told = []
    n_characters = 0
    for number, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        parts: list[dict[str, str]] = []
        given = [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        for part in given:
            if isinstance(part, TextPart):
                n_characters += len(part.text)
                parts.append({"type": "text", "text": part.text})
            elif role != "user":
                raise Refused(f"messages.{number}: only the user can show pictures, got one of the {role}")
            elif len(images) == MAX_PICTURES:
                raise Refused(f"messages: expected up to {MAX_PICTURES} pictures, got more")
            else:
                images.append(read_picture(part.image_url.url))
                parts.append({"type": "image"})
        if role == "system" and number:
            raise Refused(f"messages.{number}: the system's message must be the first one")
        told.append({"role": role, "content": parts})
    if n_characters > MAX_TEXT:
        raise Refused(f"messages: expected up to {MAX_TEXT:,} characters, got {n_characters:,}")
    if told[0]["role"] == "system" and len(told) == 1:
        raise Refused("messages: a system's message alone asks nothing; add the user's")
    try:
        conversation = Conversation(told)
    except ValueError as error:
        raise Refused(str(error)) from None
    if not conversation.strip():
        raise Refused("messages: the last one has no text, so nothing is asked")
    return conversation, images


def read_picture(url: str) -> tuple[str, Image.Image]:
    """A picture from a data URL, with a hash of its bytes."""
    if url[:5].lower() != "data:":
        raise Refused(
            "image_url: this server takes data URLs only (data:image/png;base64,...); it fetches nothing and opens no "
            f"files, got {url[:40]!r}"
        )
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().endswith(";base64") or not header.lower().startswith("data:image/"):
        raise Refused(f"image_url: expected data:image/...;base64,..., got {url[:40]!r}")
    try:
        content = base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError):
        raise Refused("image_url: what stands behind the comma is not base64") from None
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:  # reads no pixels yet
            width, height = opened.size
    except Exception:  # decoders raise what they like
        raise Refused("image_url: this is no picture that can be read; send a PNG, JPEG or WebP") from None
    if width * height > MAX_PIXELS:
        raise Refused(f"image_url: the picture has {width} x {height} pixels; up to {MAX_PIXELS:,} are taken")
    try:
        return hashlib.sha256(content).hexdigest(), open_picture(content)
    except ValueError:
        raise Refused("image_url: the picture is damaged; send another one") from None


# ---- answers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answered:
    """One answer of a request."""

    text: str
    finish: str
    """`stop` or `length`."""
    n_tokens: int
    logprobs: list[dict[str, Any]] | None
    facts: dict[str, Any]
    """`vlmfix` of the response: method, effects, passes, tokens."""


def completion(asked: Asked, answers: list[Answered], n_prompt: int) -> dict[str, Any]:
    """The body of an answer that comes at once. `vlmfix` stands beside each choice, and of the first on top."""
    choices = []
    for index, answer in enumerate(answers):
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        logprobs = None if answer.logprobs is None else {"content": answer.logprobs, "refusal": None}
        choices.append({"index": index, "message": message, "finish_reason": answer.finish, "logprobs": logprobs})
        if len(answers) > 1:
            choices[-1]["vlmfix"] = answer.facts
    return {
        "id": asked.id,
        "object": "chat.completion",
        "created": asked.created,
        "model": asked.model,
        "choices": choices,
        "usage": usage(answers, n_prompt),
        "vlmfix": answers[0].facts,
    }


def usage(answers: list[Answered], n_prompt: int) -> dict[str, int]:
    """OpenAI's count of tokens."""
    n_new = sum(answer.n_tokens for answer in answers)
    return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}


def chunk(asked: Asked, choices: list[dict[str, Any]], **more: Any) -> str:
    """One event of a stream."""
    head = {"id": asked.id, "object": "chat.completion.chunk", "created": asked.created, "model": asked.model}
    return event({**head, "choices": choices, **more})


def event(body: dict[str, Any]) -> str:
    """As server-sent events have it."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def choice(index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
    """One choice of a chunk."""
    told = None if logprobs is None else {"content": logprobs, "refusal": None}
    return {"index": index, "delta": delta, "finish_reason": finish, "logprobs": told}
