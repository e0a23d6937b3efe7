"""Captions as annotators write them: which are not of a clip at all, what is cleaned away, and the tools that
they name in brackets."""

import re

# Speech about the operation, not a picture of it: the critical view of safety, its end, a pause.
_SKIPPED = re.compile(r"cvs|手术结束|暂时", re.IGNORECASE)
# Not only words that are known: what stands there is the annotator's, and is looked up later.
TOOLS = re.compile(r"\[\s*tools?\s+(?:in|observed)\s*:\s*([^\]]*)\]", re.IGNORECASE)
_BRACKETS = re.compile(r"\[[^\]]*\]")
_NUMBER = r"(?:[A-Za-z]|[0-9]{1,2})(?![A-Za-z0-9])号?"  # which of several: 抓钳A, 戳卡2, 抓钳1号
_GRASPERS = re.compile(rf"抓钳{_NUMBER}(?:、抓钳{_NUMBER})+")
_NUMBERED = re.compile(rf"(抓钳|戳卡|电凝钩|双极电凝){_NUMBER}")


def skip_reason(text: str) -> str | None:
    """Why a caption makes no clip, or None: it speaks of CVS, of the operation's end or of a pause."""
    found = _SKIPPED.search(text)
    return f"the caption says {found[0].lower()!r}" if found else None


def clean_caption(text: str) -> str:
    """The caption without `[...]`, without numbers behind instruments, and with single spaces.

    `tools_of` must read the text before: what it reads is dropped here.
    """
    text = _BRACKETS.sub(" ", text)
    return " ".join(_NUMBERED.sub(r"\1", _GRASPERS.sub("抓钳", text)).split())


def tools_of(text: str) -> tuple[str, ...]:
    """The tools that `[Tools in: ...]` and `[Tools observed: ...]` name, each once, in order."""
    names = (name.strip() for inside in TOOLS.findall(text) for name in re.split(r"[,;/、，；]", inside))
    return tuple(dict.fromkeys(name for name in names if name))
