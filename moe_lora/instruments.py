"""Instruments as data: the names of the experts, the words that speak of them, and how a text is searched for
them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict

from .errors import WanmoeError


class Expert(BaseModel):
    """One expert: its name and the keywords that count as evidence for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Shown to users, written to files; matched without regard to case."""
    keywords: tuple[str, ...] = ()
    """Chinese words match anywhere, others as whole words with an optional plural s; a trailing * matches any
    ending of ASCII letters and digits. Empty: the name itself."""


# Keywords of the four surgical families in Chinese, plus the English words for the same tools. A bare 吸 is
# not among them: it also stands in 呼吸, breathing.
SURGICAL = (
    Expert(name="Scissors", keywords=("剪刀", "剪切", "剪断", "剪开", "scissors", "scissor", "shears")),
    Expert(
        name="Hook/Electrocautery",
        keywords=(
            *("电凝钩", "双极电凝钳", "双极电凝", "双极", "电凝钳", "电凝", "钩", "烧灼", "止血钳"),
            *("hook", "electrocautery", "cautery", "cauteri*", "electrosurg*", "bipolar", "diathermy"),
        ),
    ),
    Expert(
        name="Suction",
        keywords=(
            "吸引器",
            "吸引",
            "吸出",
            "吸除",
            "吸净",
            "清理",
            "冲洗",
            "suction*",
            "aspirat*",
            "irrigat*",
        ),
    ),
    Expert(
        name="Other",
        keywords=(
            *("抓钳", "抓取", "戳卡", "镊子", "夹持", "固定钳", "分离钳", "牵开器", "撑开", "标本袋"),
            *(
                "钛夹钳",
                "夹钳",
                "夹闭",
                "grasper",
                "grasp*",
                "forceps",
                "clipper",
                "clip applier",
                "retractor",
            ),
            *("trocar", "specimen bag", "snare"),
        ),
    ),
)


class ExpertSet:
    """An ordered set of experts, searched by name or by keywords.

    Args:
        experts: in the order of the gate columns.
        fallback: name of the expert that takes a prompt without evidence; None leaves it to the base adapter.
    """

    def __init__(self, experts: Iterable[Expert] = SURGICAL, fallback: str | None = None) -> None:
        self.experts = tuple(experts)
        self.names = [expert.name for expert in self.experts]
        if not self.experts:
            raise WanmoeError("adapter.experts is empty; name at least one expert")
        if len({name.lower() for name in self.names}) != len(self.names):
            raise WanmoeError(f"adapter.experts: names must differ, got {self.names}")
        self._patterns: list[tuple[int, re.Pattern[str]]] = []
        owner: dict[str, str] = {}
        for index, expert in enumerate(self.experts):
            for keyword in expert.keywords or (expert.name,):
                if owner.setdefault(keyword.lower(), expert.name) != expert.name:
                    raise WanmoeError(
                        f"adapter.experts: keyword {keyword!r} belongs to both {owner[keyword.lower()]!r} "
                        f"and {expert.name!r}; keep it in one"
                    )
                self._patterns.append((index, _pattern(keyword)))
        self.fallback = None if fallback is None else self.names[self.index(fallback)]

    def __len__(self) -> int:
        return len(self.experts)

    def index(self, name: str) -> int:
        """Gate column of `name`; a keyword of exactly one expert ("bipolar") is accepted as its name."""
        wanted = name.strip().lower()
        for index, known in enumerate(self.names):
            if known.lower() == wanted:
                return index
        by_keyword = self.find(name)
        if len(by_keyword) == 1:
            return self.names.index(next(iter(by_keyword)))
        near = difflib.get_close_matches(wanted, [known.lower() for known in self.names], n=1, cutoff=0.0)
        nearest = next((known for known in self.names if known.lower() in near), self.names[0])
        raise WanmoeError(
            f"unknown expert {name!r}; nearest is {nearest!r}, known are: {', '.join(self.names)}"
        )

    def find(self, text: str) -> dict[str, int]:
        """Keyword hits per expert name in `text`: longest match first, no overlaps; {} means no evidence."""
        spans = [
            (match.start(), match.end(), index)
            for index, pattern in self._patterns
            for match in pattern.finditer(text)
        ]
        taken: list[tuple[int, int]] = []
        hits: dict[str, int] = {}
        for start, end, index in sorted(spans, key=lambda span: (span[0] - span[1], span[0])):
            if all(end <= left or start >= right for left, right in taken):
                taken.append((start, end))
                hits[self.names[index]] = hits.get(self.names[index], 0) + 1
        return hits

    def to_json(self) -> dict[str, Any]:
        return {
            "experts": [expert.model_dump(mode="json") for expert in self.experts],
            "fallback": self.fallback,
        }


def _pattern(keyword: str) -> re.Pattern[str]:
    stem = keyword.rstrip("*")
    if not stem.strip():
        raise WanmoeError(f"adapter.experts: empty keyword {keyword!r}")
    if not stem.isascii():
        return re.compile(re.escape(stem), re.IGNORECASE)
    # Not \b and \w: they take Chinese characters for letters of the word, and want a letter at its edge.
    ending = "[A-Za-z0-9]*" if keyword.endswith("*") else "s?"
    return re.compile(rf"(?<![A-Za-z0-9]){re.escape(stem)}{ending}(?![A-Za-z0-9])", re.IGNORECASE)
