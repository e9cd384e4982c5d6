"""One training sample: the token ids of an example, and a label for each token that is learned.

Users of other trainers often report models that never stop, and doubled BOS. Three rules differ
here:

- EOS is learned. A text or completion ends in exactly one labelled EOS. In a conversation the
  special token that ends the assistant's turn is labelled, and so it is where the template writes
  it after the turn, with the whitespace before it if there is any; if nothing closes the last one,
  a labelled EOS is put right after it.
- BOS is never doubled. A text has the BOS that the checkpoint's tokenizer adds. A conversation has
  the BOS that its template writes, if any, as with transformers' apply_chat_template.
- A conversation, or a prompt with its completion, is tokenized as one text, as it will be at
  inference. A token across the start of a learned span is learned. A token across its end is not:
  it would teach the model to go on (".<" where a template closes with "<|im_end|>", which this
  tokenizer does not know). A special token that ends the prompt is not learned either, even if it
  swallows whitespace after it.
"""

from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice

from data.chat.assistant_spans import Span, render_with_spans
from data.chat.unwritten import check_written
from data.formats.examples import Conversation, Example, PromptCompletion, TokenIds
from data.formats.tool_calls import show_arguments
from data.tokenizer import Tokenizer
from rows.batch import NO_LOSS


@dataclass(frozen=True)
class Sample:
    """Token ids and, for each, the id to be learned at its position, or -100; not shifted.

    Attributes:
        lacks_reasoning: the chat template leaves out the reasoning of an answer that is learned.
    """

    input_ids: list[int]
    labels: list[int]
    lacks_reasoning: bool = field(default=False, compare=False)

    @property
    def num_target_tokens(self) -> int:
        """Labels that a loss sees: nothing comes before position 0 to predict its label from."""
        predicted = self.labels[1:]
        return len(predicted) - predicted.count(NO_LOSS)


def to_sample(
    example: Example,
    tokenizer: Tokenizer,
    *,
    train_on: str,
    now: datetime | None = None,
) -> Sample:
    """Tokenize an example and label the tokens to learn.

    Args:
        train_on: "completions", or "all" for every token but BOS.
        now: the time that a template may write into the text.

    Raises:
        ValueError: the template refuses the conversation, leaves out a part of it that is learned
            or that an answer depends on, or its assistant messages cannot be located.
    """
    if isinstance(example, TokenIds):
        return Sample(example.input_ids, example.labels)
    if isinstance(example, Conversation):
        return _conversation_sample(example, tokenizer, train_on, now)
    if isinstance(example, PromptCompletion):
        start = len(example.prompt) if train_on == "completions" else 0
        return _text_sample(example.prompt + example.completion, start, tokenizer)
    return _text_sample(example.text, 0, tokenizer)


def _text_sample(text: str, start: int, tokenizer: Tokenizer) -> Sample:
    """BOS, the text, EOS; learned from the character at `start` on."""
    tokens = _Tokens(text, tokenizer, add_special_tokens=True)
    tokens.drop_trailing_eos()
    if len(tokens.ids) == tokens.num_bos:
        return tokens.to_sample()
    if start:
        tokens.learn_spans([(start, len(text))])
    else:
        tokens.learn_all()
    tokens.append_eos()
    return tokens.to_sample()


def _conversation_sample(
    example: Conversation, tokenizer: Tokenizer, train_on: str, now: datetime | None
) -> Sample:
    template = tokenizer.chat_template(has_tools=example.tools is not None)
    template.check_variables([*(["tools"] if example.tools else []), *example.variables])
    messages = show_arguments(example.messages, template)
    # every rendering of this conversation sees the same clock
    now = now or datetime.now()
    seen = template.variables(tools=example.tools, variables=example.variables, now=now)
    if train_on == "all":
        text = template.write(messages, seen)
        left_out = check_written(template, messages, seen, text, range(len(messages)))
        tokens = _Tokens(text, tokenizer, add_special_tokens=False)
        tokens.learn_all()
        if not _is_closed(text, tokenizer):
            tokens.append_eos()
        return replace(tokens.to_sample(), lacks_reasoning=bool(left_out))
    text, spans = render_with_spans(
        template,
        messages,
        targets=example.targets,
        tools=example.tools,
        variables=example.variables,
        now=now,
    )
    left_out = check_written(template, messages, seen, text, example.targets)
    if template.has_marks():
        # they often enclose no more than the content
        spans = [_with_closing_token(text, span, tokenizer) for span in spans]
    start, end = spans[-1]
    is_closed = _is_closed(text[start:end], tokenizer)
    # the text is cut where EOS goes, so that no token lies across it
    cut = len(text) if is_closed else end
    tokens = _Tokens(text[:cut], tokenizer, add_special_tokens=False)
    tokens.learn_spans(spans)
    if not is_closed:
        tokens.append_eos()
        tokens.append_unlearned(text[cut:])
    return replace(tokens.to_sample(), lacks_reasoning=bool(left_out))


def _is_closed(text: str, tokenizer: Tokenizer) -> bool:
    return text.rstrip().endswith(tokenizer.closing_tokens)


def _with_closing_token(text: str, span: Span, tokenizer: Tokenizer) -> Span:
    """The span with the special token that follows it, after whitespace at most, if it has none."""
    start, end = span
    rest = text[end:].lstrip()
    token = next((t for t in tokenizer.closing_tokens if rest.startswith(t)), None)
    if token is None or _is_closed(text[start:end], tokenizer):
        return span
    return start, len(text) - len(rest) + len(token)


class _Tokens:
    """The tokens of a text while it is decided which of them are learned."""

    def __init__(self, text: str, tokenizer: Tokenizer, add_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self.ids, self._offsets = tokenizer.encode_with_offsets(text, add_special_tokens)
        bos = tokenizer.bos_token_id
        while bos is not None and self.ids[:2] == [bos, bos]:
            del self.ids[0], self._offsets[0]
        self.num_bos = int(bos is not None and self.ids[:1] == [bos])
        self._is_target = [False] * len(self.ids)

    def drop_trailing_eos(self) -> None:
        """Remove the EOS that a post-processor adds or the text spells out."""
        while len(self.ids) > self.num_bos and self.ids[-1] == self._tokenizer.eos_token_id:
            del self.ids[-1], self._offsets[-1], self._is_target[-1]

    def learn_all(self) -> None:
        self._is_target = [i >= self.num_bos for i in range(len(self.ids))]

    def learn_spans(self, spans: list[Span]) -> None:
        """Label the tokens of the spans, which are ascending; the module docstring says which."""
        special_ids = self._tokenizer.special_ids
        rest = iter(spans)
        span_start, span_end = next(rest)
        for i, (start, end) in islice(enumerate(self._offsets), self.num_bos, None):
            while span_end <= start:
                span = next(rest, None)
                if span is None:
                    return
                span_start, span_end = span
            if span_start < end and start < end:
                # whitespace beside a special token can be part of it (lstrip, rstrip)
                is_special = self.ids[i] in special_ids
                self._is_target[i] = start >= span_start if is_special else end <= span_end

    def append_eos(self) -> None:
        assert self._tokenizer.eos_token_id is not None
        self.ids.append(self._tokenizer.eos_token_id)
        self._is_target.append(True)

    def append_unlearned(self, text: str) -> None:
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        self.ids += ids
        self._is_target += [False] * len(ids)

    def to_sample(self) -> Sample:
        pairs = zip(self.ids, self._is_target, strict=True)
        return Sample(self.ids, [i if is_target else NO_LOSS for i, is_target in pairs])
