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


# The six tools of Cholec80 and CholecT50. A bare 夹 is not among the clipper's words, since forceps that hold
# do it too (夹住); nor is a bare "clip", which is also a video.
CHOLEC = (
    Expert(
        name="grasper",
        keywords=("抓钳", "抓取", "镊子", "夹持", "固定钳", "分离钳", "grasper", "grasp*", "forceps"),
    ),
    Expert(
        name="bipolar",
        keywords=(
            *("双极电凝钳", "双极电凝", "双极", "电凝钳"),
            *("bipolar", "bipolar forceps", "bipolar grasper"),
        ),
    ),
    Expert(
        name="hook",
        keywords=(
            *("电凝钩", "电凝", "钩", "烧灼"),
            *("hook", "electrocautery", "cautery", "cauteri*", "electrosurg*", "monopolar", "diathermy"),
        ),
    ),
    Expert(name="scissors", keywords=("剪刀", "剪切", "剪断", "剪开", "scissors", "scissor", "shears")),
    Expert(
        name="clipper",
        keywords=(
            *("钛夹钳", "夹钳", "夹闭", "钛夹", "夹子", "施夹"),
            *("clipper", "clip applier", "clip applicator", "clipping"),
        ),
    ),
    Expert(
        name="irrigator",
        keywords=(
            *("吸引器", "冲洗器", "吸引", "吸出", "吸除", "吸净", "清理", "冲洗"),
            *("irrigat*", "suction*", "aspirat*"),
        ),
    ),
)

# Family of SURGICAL -> tools of CHOLEC that belong to it.
_TOOLS = {
    "scissors": ("scissors",),
    "hook/electrocautery": ("bipolar", "hook"),
    "suction": ("irrigator",),
    "other": ("grasper", "clipper"),
}
_OTHER_TAXONOMY = _TOOLS | {tool: (family,) for family, tools in _TOOLS.items() for tool in tools}


def known_experts(names: Iterable[str]) -> tuple[Expert, ...]:
    """Experts of these names: with our keywords where we know the instrument, else with the name alone.

    A name that both taxonomies have gets its words from the one that knows more of the names. No keyword is
    given twice, so that any list of different names makes an `ExpertSet`.
    """
    names = tuple(names)
    wanted = {name.lower() for name in names}
    taxonomies = [
        {expert.name.lower(): expert.keywords for expert in experts} for experts in (SURGICAL, CHOLEC)
    ]
    taxonomies.sort(key=lambda words: len(words.keys() & wanted), reverse=True)
    words = {**taxonomies[1], **taxonomies[0]}
    taken: set[str] = set()
    experts = []
    for name in names:
        others = taken | (wanted - {name.lower()})
        keywords = tuple(word for word in words.get(name.lower(), ()) if word.lower() not in others)
        taken.update(word.lower() for word in keywords)
        experts.append(Expert(name=name, keywords=keywords))
    return tuple(experts)


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
        self._owner = {keyword.rstrip("*"): name for keyword, name in owner.items()}
        self._own = self._owner.keys() | {name.lower() for name in self.names}
        self.fallback = None if fallback is None else self.names[self.index(fallback)]

    def __len__(self) -> int:
        return len(self.experts)

    def index(self, name: str) -> int:
        """Gate column of `name`, which may also be one of the keywords of an expert ("bipolar")."""
        wanted = name.strip().lower()
        for index, known in enumerate(self.names):
            if known.lower() == wanted:
                return index
        if wanted in self._owner:
            return self.names.index(self._owner[wanted])
        spelled = {known.lower(): known for known in [*self._owner, *self.names]}
        names = [known.lower() for known in self.names]
        near = difflib.get_close_matches(wanted, spelled, n=1, cutoff=0.75)
        nearest = spelled[(near or difflib.get_close_matches(wanted, names, n=1, cutoff=0.0))[0]]
        raise WanmoeError(
            f"unknown expert {name!r}; nearest is {nearest!r}, known are: {', '.join(self.names)}"
        )

    def weights(self, name: str) -> dict[str, float]:
        """What a hint or label means in this set, as weights per expert name that sum to 1.

        A name or keyword of the set is that expert. A name of the other of the two surgical taxonomies (four
        families, six Cholec tools) stands for its members here in equal parts: "Hook/Electrocautery" is half
        bipolar, half hook on a set of tools. Raises WanmoeError as `index` does.
        """
        wanted = name.strip().lower()
        if wanted not in self._own:
            members = [known for known in self.names if known.lower() in _OTHER_TAXONOMY.get(wanted, ())]
            if members:
                return dict.fromkeys(members, 1 / len(members))
        return {self.names[self.index(name)]: 1.0}

    def shares(self, weights: Iterable[tuple[str, float]]) -> dict[str, float]:
        """(name, weight) pairs of either taxonomy as weights per expert name, of the same sum: a name is
        spread as `weights` says, and what names the same expert adds up. Raises WanmoeError as `index` does.
        """
        found: dict[str, float] = {}
        for name, weight in weights:
            for member, part in self.weights(name).items():
                found[member] = found.get(member, 0.0) + weight * part
        return found

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
