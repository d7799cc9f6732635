"""How a registered version answers, in `mlflow models serve` and where `mlflow.pyfunc` loads it.

A version holds the adapter only; its base is found by `base_of_version`. It answers with PyTorch or with MLX, whichever
`model.backend: auto` takes here; which of them trained it does not matter.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nestune.data.questions import Question, check_questions
from nestune.errors import ConfigError, InputError, NestuneError
from nestune.evaluation.answers import Reply, reply
from nestune.registry.computing_thread import ComputingThread

MAX_TOKENS = "max_tokens"
FORMS = (
    'a list of questions, each a text or {"messages": [{"role": "user", "content": "..."}, ...]}, or one '
    '{"messages": [...]} with or without "max_tokens"'
)


class Serving:
    """What MLflow calls: first `load_context`, then `predict`, from any thread, also from several at once."""

    def load_context(self, context: Any) -> None:
        """Load the base and put the adapter on it; raises ConfigError when it is not the adapter's base."""
        self._thread = ComputingThread()
        self._replies = self._thread.run(lambda: _Replies(context.model_config, context.artifacts["adapter"]))

    def predict(self, context: Any, model_input: list[Any], params: Mapping[str, Any]) -> list[str]:
        """The greedy answer to each question of a list, whatever else is asked.

        A chat, `{"messages": [...]}`, is answered as OpenAI's and MLflow's chat models do, by a chat completion in
        place of the list. params: `max_tokens` of an answer, which the signature of the version has a default for.
        Raises MlflowException, an HTTP status of 400 for wrong input.
        """
        with _told_to_mlflow():
            max_tokens = int(params[MAX_TOKENS])
            if max_tokens < 1:
                raise ConfigError(f"{MAX_TOKENS} is {max_tokens}; allowed is a whole number of 1 or more.")
            if isinstance(model_input, dict):
                return _completion(self._reply(_chat(model_input), max_tokens))
            questions = check_questions(_listed(model_input), "inputs")
            return [self._reply(question, max_tokens).text for question in questions]

    def _reply(self, question: Question, max_tokens: int) -> Reply:
        # One question at a time, so that a long list lets others in between.
        return self._thread.run(lambda: self._replies.to(question, max_tokens))


class _Replies:
    """The model, as its evaluation computed with it."""

    def __init__(self, settings: Mapping[str, Any], adapter: str) -> None:
        from nestune.backends.factory import make_backend
        from nestune.config import RunConfig
        from nestune.data.tokens import load_tokenizer
        from nestune.registry.base_of_version import find_base

        base = find_base(settings)
        # What decides the answers, as in the evaluation; no data is read.
        config = RunConfig.model_validate(
            {
                "name": "served",
                "model": {"base": str(base.folder), "dtype": settings["dtype"]},
                "lora": settings["lora"],
                "training": {"precision": settings["precision"]},
                "data": {"train": adapter},
            }
        )
        self._tokenizer, self._positions = load_tokenizer(base.folder), base.positions
        self._backend = make_backend(config)
        self._backend.show_adapter(Path(adapter))

    def to(self, question: Question, max_tokens: int) -> Reply:
        return reply(self._backend, self._tokenizer, question, max_tokens, self._positions)


@contextmanager
def _told_to_mlflow() -> Iterator[None]:
    """Turn an error that the user can act on into MLflow's, whose server shows its text: 400 for wrong input, else 500.

    Anything else it would answer with a traceback.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE

    try:
        yield
    except NestuneError as error:
        code = INVALID_PARAMETER_VALUE if isinstance(error, InputError) else INTERNAL_ERROR
        raise MlflowException(str(error), error_code=code) from error


def _chat(request: Mapping[str, Any]) -> Question:
    """The turns of a request for a chat completion."""
    others = [key for key in request if key != "messages"]
    if "messages" not in request or others:
        raise ConfigError(
            f"the request has {', '.join(request)}; allowed is {FORMS}. Answers are greedy, and come whole."
        )
    return check_questions([{"messages": request["messages"]}], "request")[0]


def _listed(model_input: Any) -> list[Any]:
    """The questions of a list, or of a table of one column, as MLflow's evaluation and its CSV reader make it."""
    columns = getattr(model_input, "columns", None)
    if columns is not None and len(columns) == 1:
        return list(model_input.iloc[:, 0])
    if not isinstance(model_input, list):
        raise ConfigError(f"the input is {type(model_input).__name__}; allowed is {FORMS}.")
    return model_input


def _completion(reply: Reply) -> Any:
    """A chat completion, as a JSON object."""
    from mlflow.types.llm import ChatChoice, ChatCompletionResponse, ChatMessage, TokenUsageStats

    choice = ChatChoice(
        message=ChatMessage(role="assistant", content=reply.text), finish_reason="stop" if reply.ended else "length"
    )
    usage = TokenUsageStats(
        prompt_tokens=reply.read, completion_tokens=reply.written, total_tokens=reply.read + reply.written
    )
    return ChatCompletionResponse(choices=[choice], usage=usage).to_dict()
