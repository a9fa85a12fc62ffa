"""The words around the poses of a clip, in a language model's tokens, and its chat template where it has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from toolkit.errors import UserError
from toolkit.recipe.prompts import POSES, around_poses, placeholders
from toolkit.recipe.sections.model import Model


@dataclass(frozen=True)
class Words:
    """What stands around the poses of a clip.

    Attributes:
        before: tokens of every clip, the first of all.
        template: the clip's own words after them, in which conditions stand; empty where it has none.
        behind: tokens of every clip between its poses and the start token.
        start: token that every text begins with.
    """

    before: list[int]
    template: str
    behind: list[int]
    start: int


def words_around_poses(model: Model, tokenizer: PreTrainedTokenizerBase) -> Words:
    """The words of ``model.prompt``, or of ``model.prefix``, which knows no chat and nothing behind the poses.

    Raises:
        UserError: the chat template leaves the poses or the words out.
    """
    own, behind = around_poses(model.prompt) if model.prompt else (model.prefix or "", "")
    own = own.strip()
    if model.prompt and tokenizer.chat_template:
        before, behind = _chat(model.prompt, own, tokenizer)
    else:
        before = (tokenizer.bos_token or "") + own
    names_conditions = bool(placeholders(own))
    if names_conditions:
        before = before.removesuffix(own)
    after = _tokens(tokenizer, behind)
    return Words(
        before=_tokens(tokenizer, before),
        template=own if names_conditions else "",
        behind=after[:-1],
        # Between documents these models read the token that ends one.
        start=after[-1] if after else int(tokenizer.eos_token_id),
    )


def _chat(prompt: str, own: str, tokenizer: Any) -> tuple[str, str]:
    """The prompt as a user's message of a chat whose answer follows, before and behind its poses."""
    message = [{"role": "user", "content": prompt.strip()}]
    chat: str = tokenizer.apply_chat_template(
        message, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    before, poses, behind = chat.partition(POSES)
    before = before.rstrip(" ")
    if not poses or POSES in behind or not before.endswith(own):
        raise UserError(
            f"model.prompt: the tokenizer's chat template makes {chat[:120]!r} of it, which lacks poses or their words",
            "use model.prefix, which takes no chat template, or a backbone with another one",
        )
    return before, behind


def _tokens(tokenizer: Any, words: str) -> list[int]:
    return list(tokenizer(words, add_special_tokens=False)["input_ids"]) if words else []
