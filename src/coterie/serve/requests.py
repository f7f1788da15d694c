"""What clients ask for, as OpenAI's API has it: read strictly, refused early, turned into a task.

What would change an answer and is not done here is refused by name, unless it has the value that changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from coterie.errors import InputError
from coterie.run.engine import Runtime, Sampling
from coterie.serve.generation import Task
from coterie.serve.refusals import Refusal
from coterie.serve.tools import ToolForm

#: Answers to one request at most, over all prompts.
MOST_ANSWERS = 16

#: Likely tokens that are told beside each token at most.
_MOST_TOP = 20

#: Parameters that change nothing of an answer.
_WITHOUT_EFFECT = frozenset({
    "metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user",
})  # fmt: skip

#: Parameters that would change it, which is not done here, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "best_of": (1,), "echo": (False,),
    "suffix": ("",), "response_format": ({"type": "text"},), "modalities": (["text"],),
}  # fmt: skip

#: Messages of one refusal at most; where there are several ways to write a parameter, each has its own.
_MOST_MESSAGES = 4

_CONFIG = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)

_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class _Part(BaseModel):
    """A part of a message; text alone."""

    model_config = ConfigDict(strict=True, frozen=True)

    type: Literal["text"]
    text: str


class _Function(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(strict=True, frozen=True)

    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _Tool(BaseModel):
    """A tool; a function alone."""

    model_config = ConfigDict(strict=True, frozen=True)

    type: Literal["function"]
    function: _Function


class _Called(BaseModel):
    """A function that was called, and how."""

    model_config = ConfigDict(strict=True, frozen=True)

    name: str
    arguments: str


class _ToolCall(BaseModel):
    """A call of a function in a message."""

    model_config = ConfigDict(strict=True, frozen=True)

    id: str
    type: Literal["function"] = "function"
    function: _Called

    def for_template(self) -> dict[str, Any]:
        """Return it as chat templates expect it: arguments as what they say."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            raise Refusal(400, "the arguments of a call in tool_calls are not JSON", param="messages") from None
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    name: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """Return it as chat templates expect it."""
        parts = self.content
        text = "".join(part.text for part in parts) if isinstance(parts, list) else parts or ""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        told = {"name": self.name, "tool_call_id": self.tool_call_id}
        message |= {key: value for key, value in told.items() if value is not None}
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message


class _StreamOptions(BaseModel):
    """What a stream holds beside the answer."""

    model_config = ConfigDict(strict=True, frozen=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class _Request(BaseModel):
    """What both kinds of requests have."""

    model_config = _CONFIG

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def task(
        self, prompts: Sequence[Tensor], *, max_tokens: int, top: int | None, form: ToolForm | None = None
    ) -> Task:
        """Return what is to be generated after prompts, which are given as ids (1, S)."""
        return Task(
            prompts=prompts, num_answers=self.n or 1, max_tokens=max_tokens,
            sampling=Sampling(
                temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
                repetition_penalty=self.repetition_penalty, seed=self.seed,
            ),
            stops=[self.stop] if isinstance(self.stop, str) else self.stop or [], top=top, form=form,
        )  # fmt: skip


class ChatRequest(_Request):
    """A conversation to go on with."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MOST_TOP)] | None = None
    tools: list[_Tool] | None = None
    tool_choice: Any = None

    def prepare(self, runtime: Runtime, form: ToolForm | None) -> Task:
        """Return the task, given how the model calls functions; takes as long as the prompt is."""
        if self.tool_choice not in (None, "auto", "none"):
            raise Refusal(
                400, "tool_choice is auto or none here: the model cannot be made to call a function",
                code="unsupported_parameter", param="tool_choice",
            )  # fmt: skip
        tools = None
        if self.tools and self.tool_choice != "none":
            if form is None:
                raise Refusal(
                    400, "this model's chat template has no calls of functions that could be read; leave tools out",
                    code="unsupported_parameter", param="tools",
                )  # fmt: skip
            tools = [tool.model_dump(exclude_none=True) for tool in self.tools]
        if self.top_logprobs and not self.logprobs:
            raise Refusal(400, "top_logprobs takes logprobs: true", param="top_logprobs")
        if not runtime.tokenizer.chat_template:
            raise Refusal(400, "this model has no chat template; send a text to /v1/completions", param="messages")
        messages = [message.for_template() for message in self.messages]
        ids_1S = _ids(lambda: runtime.ids(messages, tools=tools), "messages")
        max_tokens = self.max_completion_tokens or self.max_tokens or runtime.context
        return self.task(
            [ids_1S], max_tokens=max_tokens, top=(self.top_logprobs or 0) if self.logprobs else None,
            form=form if tools else None,
        )  # fmt: skip


class CompletionRequest(_Request):
    """Texts to go on with."""

    prompt: str | list[str] | _Ids | list[_Ids]
    logprobs: Annotated[int, Field(ge=0, le=_MOST_TOP)] | None = None

    def prepare(self, runtime: Runtime, form: ToolForm | None) -> Task:
        """Return the task; takes as long as the prompts are."""
        given: Any = self.prompt
        single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
        prompts: list[str | list[int]] = [given] if single else list(given)
        if not prompts:
            raise Refusal(400, "there is no prompt", param="prompt")
        if len(prompts) * (self.n or 1) > MOST_ANSWERS:
            raise Refusal(400, f"{len(prompts)} prompts with n={self.n or 1} are more than {MOST_ANSWERS} answers")
        ids = [_ids(lambda each=each: _of_prompt(runtime, each), "prompt") for each in prompts]  # type: ignore[misc]
        return self.task(ids, max_tokens=self.max_tokens or 16, top=self.logprobs)  # 16 is OpenAI's


_AnyRequest = TypeVar("_AnyRequest", bound=_Request)


def read_request(kind: type[_AnyRequest], body: bytes) -> _AnyRequest:
    """Return a request.

    Raises:
        Refusal: it is not one; says which parameter and why, and repeats nothing of what it holds.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        param = errors[0]["loc"][0] if errors[0]["loc"] else None
        messages = [_message(each["loc"], each["msg"]) for each in errors if each["loc"][:1] == errors[0]["loc"][:1]]
        message = "; or ".join(dict.fromkeys(messages[:_MOST_MESSAGES]))
        raise Refusal(400, message, param=None if param is None else str(param)) from None
    for name, value in (request.model_extra or {}).items():
        if value is None or name in _WITHOUT_EFFECT or value in _NEUTRAL.get(name, ()):
            continue
        if name in _NEUTRAL:
            raise Refusal(400, f"{name} with this value is not supported", code="unsupported_parameter", param=name)
        raise Refusal(400, f"unknown parameter: {json.dumps(name)[:80]}", code="unknown_parameter", param=name[:80])
    return request


def _message(place: Sequence[int | str], message: str) -> str:
    """Return what is wrong in a place, without the names of types that were tried there."""
    names = [str(part) for part in place if isinstance(part, int) or (part.isidentifier() and part != "str")]
    return f"{'.'.join(names)}: {message}" if names else message


def _ids(make: Callable[[], Tensor], param: str) -> Tensor:
    try:
        return make()
    except InputError as error:
        code = "context_length_exceeded" if "--context" in str(error) else None
        raise Refusal(400, str(error), code=code, param=param) from None
    except Exception as error:  # a template is a program, and fails as programs do
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise Refusal(400, f"the model's chat template does not take this: {reason}", param=param) from None


def _of_prompt(runtime: Runtime, prompt: str | list[int]) -> Tensor:
    """Return the ids (1, S) of a prompt of a completion."""
    if isinstance(prompt, str):
        return runtime.ids(prompt, template=False)
    size = len(runtime.tokenizer)
    if max(prompt) >= size:
        raise InputError(f"the prompt has a token {max(prompt)}, and the model knows those below {size}")
    if len(prompt) >= runtime.context:
        raise InputError(
            f"the prompt has {len(prompt)} tokens, which leaves none of --context {runtime.context} for an answer"
        )
    return torch.tensor([prompt])
