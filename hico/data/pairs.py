"""Preference rows: one prompt with its videos and images, and two answers to it, in the forms in use."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from reprlib import repr as shown
from typing import Any

from hico.data.forms import ROLES, TALKS
from hico.data.records import Record, parse_row
from hico.data.rowfiles import RowFiles

PROMPTS = ("prompt", *TALKS)
ANSWERS = ("chosen", "rejected")
NOTES = ("answer", "chosen_score", "rejected_score")
"""What LLaVA-Hound's preference rows say beside: a reference answer, and how a judge scored the two."""
SWIFT = "rejected_response"
"""ms-swift's word for the other answer; its chosen one ends the conversation."""


def parse_pair(
    row: Mapping[str, Any], rows: RowFiles, index: int, *, root: str = "", other_keys: Collection[str] = ()
) -> Record:
    """Bring a preference row to one form; see `hico.data.records.parse_row` for arguments and media.

    Returns:
        The conversation with the chosen answer; its ``rejected`` is the one with the other. Only these last answers
        are learned from, whatever the turns before.

    Raises:
        ValueError: if the row is malformed; the message gives file and line.
    """
    try:
        chosen, rejected = split_pair(row)
    except ValueError as error:
        raise ValueError(f"malformed row at {rows.where(index)}: {error}") from error
    record, other = (parse_row(part, rows, index, root=root, other_keys=other_keys) for part in (chosen, rejected))
    return replace(record, rejected=other.messages)


def split_pair(row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the row with its chosen answer alone, and with its rejected one, as plain rows.

    The prompt is a text or turns under ``prompt``, ``conversations`` or ``messages``, or what both answers begin with;
    an answer is a text, a turn, or turns that end with it.

    Raises:
        ValueError: if one of the two answers or the prompt is missing, the answers are the same, or there are two
            prompts.
    """
    prompts = {key: _turns(row[key], "user", key) for key in PROMPTS if row.get(key)}
    given = {key: row[key] for key in ANSWERS if row.get(key)}
    if row.get(SWIFT):
        given.setdefault("rejected", row[SWIFT])
        talk = next((talk for talk in prompts.values() if _is_answer(talk[-1])), None)
        if talk:
            given.setdefault("chosen", [talk[-1]])
    if missing := [key for key in ANSWERS if key not in given]:
        raise ValueError(
            f"it lacks {' and '.join(map(repr, missing))}; a preference row has two answers, 'chosen' and 'rejected'"
        )
    answers = {key: _turns(said, "assistant", key) for key, said in given.items()}
    for key, turns in answers.items():
        if not _is_answer(turns[-1]):
            raise ValueError(f"{key!r} ends with a turn of {turns[-1].get('role')!r}, not with an answer")
    if answers["chosen"][-1] == answers["rejected"][-1]:
        raise ValueError("'chosen' and 'rejected' are the same answer, so nothing can be learned from them")
    found = [turns[:-1] if turns[-1] == answers["chosen"][-1] else turns for turns in prompts.values()]
    found += [turns[:-1] for turns in answers.values() if turns[:-1]]
    if not found:
        raise ValueError(f"it has none of {', '.join(map(repr, PROMPTS))} that the two answers would belong to")
    prompt, *others = found
    if any(other != prompt for other in others):
        raise ValueError("its prompts differ; the two answers must belong to the same one, given once")
    if not prompt or _is_answer(prompt[-1]):
        raise ValueError("its prompt ends with an answer that is not the chosen one; end it with the user's turn")
    rest = {key: value for key, value in row.items() if key not in (*PROMPTS, *ANSWERS, *NOTES, SWIFT)}
    prompt = [_not_learned(turn) for turn in prompt]
    return tuple({**rest, "messages": [*prompt, answers[key][-1]]} for key in ANSWERS)


def _turns(said: Any, role: str, key: str) -> list[dict[str, Any]]:
    """Return what is said as turns with ``role`` and ``content``; a text alone is one turn of ``role``."""
    turns = said if isinstance(said, list) else [said]
    return [{"role": role, "content": turn} if isinstance(turn, str) else _turn(turn, key) for turn in turns]


def _turn(turn: Any, key: str) -> dict[str, Any]:
    for speaker, content in TALKS.values():
        if isinstance(turn, Mapping) and speaker in turn and content in turn:
            others = {name: value for name, value in turn.items() if name not in (speaker, content)}
            role = turn[speaker]
            known = ROLES.get(role, role) if isinstance(role, str) else role
            return {"role": known, "content": turn[content], **others}
    raise ValueError(f"{key!r} holds {shown(turn)}; write a text, or turns with 'from' and 'value'")


def _is_answer(turn: Mapping[str, Any]) -> bool:
    return turn.get("role") == "assistant"


def _not_learned(turn: dict[str, Any]) -> dict[str, Any]:
    if not _is_answer(turn):
        return turn
    return {**{key: value for key, value in turn.items() if key != "weight"}, "loss": False}
