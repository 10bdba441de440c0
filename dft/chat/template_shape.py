"""Learn how a chat template writes assistant turns, by rendering small conversations that most templates take."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from dft.chat.anchors import Anchor, render_anchored, start_of_next
from dft.chat.generation_prompt import ANSWER, QUESTION, common_length
from dft.chat.template import CALLING, TEMPLATE_ERRORS, ChatTemplate

OTHER_QUESTION = {"role": "user", "content": "other"}
THINKING = {**ANSWER, "reasoning_content": "reasons"}
TOOL = {"type": "function", "function": {"name": "probe_tool", "description": "d", "parameters": {}}}


@dataclass(frozen=True)
class TemplateShape:
    """How one template begins and ends assistant turns; what could not be learned is empty.

    Attributes:
        header: the header of a turn, as the template writes it for a generation prompt.
        plain_header: the header of a turn without tool calls, for templates without a generation prompt.
        openers: what the template writes between a header and a tool call or thinking block.
        plain_ends: the tokens that end turns without tool calls.
        inside: the control tokens inside turns, which therefore end none.
    """

    header: str = ""
    plain_header: str = ""
    openers: tuple[str, ...] = ()
    plain_ends: frozenset[str] = frozenset()
    inside: frozenset[str] = frozenset()


def learn_shape(template: ChatTemplate, header: str) -> TemplateShape:
    """Learns the shape of a template's turns; a probe that the template refuses teaches nothing.

    Args:
        header: see TemplateShape.
    """
    plain_ends = _plain_ends(template)
    plain = _probe(template, [QUESTION, ANSWER])
    if plain is None:
        return TemplateShape(header, plain_ends=plain_ends)
    text, anchors = plain
    before_answer = text[anchors[0].end : anchors[1].start].rstrip(" ")
    tokens = list(template.control.unmarked.finditer(before_answer))
    plain_header = before_answer[tokens[-1].start() :] if tokens else before_answer
    thinking = _probe(template, [QUESTION, THINKING])
    calling = _probe(template, [*CALLING, ANSWER], [TOOL]) or _probe(template, CALLING[:2], [TOOL])
    openers = [_opener(*probe, before_answer) for probe in (thinking, calling) if probe]
    return TemplateShape(
        header=header,
        plain_header=plain_header,
        openers=tuple(opener for opener in openers if opener.strip()),
        plain_ends=plain_ends,
        inside=_tokens_inside(template, *calling, before_answer, plain_ends) if calling else frozenset(),
    )


def end_of_turn(
    template: ChatTemplate,
    shape: TemplateShape,
    text: str,
    position: int,
    limit: int,
    without_the_rest: Callable[[], str] = str,
) -> int | None:
    """The end of the token that ends a turn.

    It is one that ends turns without calls; or else the last one that the template writes where the conversation ends
    with this turn; or else the first one that does not stand inside turns.

    Args:
        position: where the last text of the turn ends.
        limit: where the text of the next message starts.
        without_the_rest: renders the conversation up to this turn.
    """
    tokens = list(template.control.unmarked.finditer(text, position, limit))
    outside = [token for token in tokens if token[0] not in shape.inside]
    plain = next((token.end() for token in outside if token[0] in shape.plain_ends), None)
    if plain is not None or not tokens:
        return plain
    shown = common_length(template, text, without_the_rest())
    own = [token.end() for token in tokens if token.end() <= shown]
    return own[-1] if own else outside[0].end() if outside else None


def _probe(template: ChatTemplate, messages: list[dict], tools: list | None = None) -> tuple[str, list[Anchor]] | None:
    """Text and anchors of a small conversation; None if the template refuses it or leaves a message out."""
    try:
        text, anchors = render_anchored(template, messages, tools)
    except TEMPLATE_ERRORS:
        return None
    return (text, anchors) if {0, 1} <= {a.number for a in anchors} else None


def _plain_ends(template: ChatTemplate) -> frozenset[str]:
    probe = _probe(template, [QUESTION, ANSWER, OTHER_QUESTION, ANSWER])
    if probe is None:
        return frozenset()
    text, anchors = probe
    closings = []  # what follows the answer in the middle, and the one at the end
    for number in (1, 3):
        position = max((a.end for a in anchors if a.number == number), default=len(text))
        closings.append(text[position : start_of_next(anchors, number, text)])
    # A turn may close with several tokens, as Command R's does; those that follow both answers belong to the turn.
    control, eos_token = template.control.unmarked, template.tokenizer.eos_token
    tokens = [m[0] for m in control.finditer(os.path.commonprefix(closings))]
    if tokens:
        return frozenset([eos_token if eos_token in tokens else tokens[-1]])
    firsts = (control.search(closing) for closing in closings)
    return frozenset(m[0] for m in firsts if m)


def _opener(text: str, anchors: list[Anchor], before_answer: str) -> str:
    """What stands before the first text of message 1, beyond what stands before a plain answer."""
    leading = _before_turn(text, anchors)
    if not leading.startswith(before_answer):
        return ""
    return leading.removeprefix(before_answer).partition("probe_tool")[0]


def _tokens_inside(
    template: ChatTemplate, text: str, anchors: list[Anchor], before_answer: str, plain_ends: frozenset[str]
) -> frozenset[str]:
    """The control tokens inside the tool call of message 1, before the token that ends the turn."""
    last = [a for a in anchors if a.number == 1][-1]
    limit = start_of_next(anchors, 1, text)
    end = end_of_turn(template, TemplateShape(plain_ends=plain_ends), text, last.end, limit)
    header = os.path.commonprefix([before_answer, _before_turn(text, anchors)])
    tokens = template.control.unmarked.finditer(text, anchors[0].end + len(header), end or limit)
    return frozenset(m[0] for m in tokens if end is None or m.end() < end)


def _before_turn(text: str, anchors: list[Anchor]) -> str:
    """What stands between the question and the first text of message 1."""
    return text[anchors[0].end : next(a for a in anchors if a.number == 1).start]
