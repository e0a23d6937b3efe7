"""Prompts that no clip has: sentences around the keywords of an expert set, labelled with what they name.

Few clips show one tool each under captions of few forms, so a router that reads these alone learns the form
and not the word. The sentences here put every keyword among many other words, alone and beside a word of a
second expert: what stays the same is the keyword. They need not be good prose, and are not shown to the video
model: only their pooled text embedding is kept, for the router.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from typing import NamedTuple

from ...moe_lora.instruments import Expert, ExpertSet

MOST = 2000
"""Prompts of a set at the most."""
_PER_EXPERT = 250  # and language
_TWO = 0.4  # share of the sentences that name two experts
_SHORT = 0.5  # share of the clauses that have hardly a word beside the keyword
_ALONE = 0.2  # share at the most of the prompts that are a keyword and nothing else
_TRIES = 20  # sentences drawn for each that is wanted: repeated and ambiguous ones are left out

_CJK = re.compile("[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]")

# What a keyword with a star may end in, by the end of its stem, and the clauses that such a word goes into.
_ENDINGS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("at", (("ion", "thing"), ("or", "thing"), ("es", "does"), ("ed", "done"), ("ing", "doing"))),
    ("i", (("zes", "does"), ("zed", "done"), ("zing", "doing"), ("ses", "does"), ("sed", "done"))),
    ("rg", (("ery", "thing"), ("ical tip", "thing"))),
    ("", (("", "thing"), ("s", "does"), ("ed", "done"), ("ing", "doing"))),
)

_ENGLISH = {
    "opening": "endoscopic view:|laparoscopic view:|close up:|in this clip|in this video|on the screen|"
    "during the operation|during dissection|under the camera|at first|later|now|meanwhile|then|finally|again|"
    "in the abdomen|deep inside|here|we see that|once more|for a moment|at the same time|in the next scene",
    "det": "the|a|this|that|its|one|another|the same|our|her|his|each|some|two",
    "kind": "slender|curved|long|short|small|metal|black|white|bright|straight|second|left|right|fine|large|"
    "single|new|robotic|blunt|sharp|thin|thick|hot|clean|open|rigid|brief|repeated|precise",
    "who": "surgeon|assistant|operator|doctor|team|left hand|right hand|robot|trainee|she|he",
    "acts": "moves toward|touches|approaches|enters beside|works on|reaches|presses on|frees|dissects|treats|"
    "opens|closes on|shows|lifts|slides along|pulls|pushes|leaves|advances to|rests on|cleans|separates|"
    "divides|removes|stops|drains|clears|turns|holds|finds|follows|crosses|exposes|stretches|takes|brings|"
    "keeps|makes|comes from|goes into|passes over|returns to|appears over",
    "done": "freed|treated|opened|closed|lifted|moved|cleaned|cut off|removed|exposed|divided|held|seen|"
    "stopped|pulled aside|drained|dried|reached|stretched|taken out|sealed|prepared|mobilised|released",
    "place": "tissue|gallbladder|liver|cystic duct|artery|vein|vessel|peritoneum|omentum|bowel|stomach|"
    "spleen|colon|appendix|adhesions|fat|fascia|muscle|membrane|uterus|ovary|tube|pelvis|mesentery|"
    "abdominal wall|surface|bleeding point|blood|bile|fluid|smoke|wound|bed|edge|field|view|stump|scar|polyp|"
    "cyst|fibers|layer|band|nerve|ureter|kidney|bladder|lesion|tumour|suture|needle|clot|abscess|stone|port|"
    "cavity",
    "tail": "from the left|from the right|from above|from below|with care|slowly|gently|firmly|"
    "near the organ|beside the vessel|until nothing moves|and then stops|into the picture|in the centre|"
    "at the edge|behind it|along the border|under the lobe|over the stump|while the assistant waits|"
    "and leaves|to the other side|before the next step|in one movement|step by step|through the wall|upward|"
    "downward|toward the camera|away from it|with traction|without bleeding|for the first time|"
    "so that it can be seen|where it was|between two layers|out of the body|as before|again and again|once|"
    "twice|that was hidden|has been found|all around",
    "join": " and |, and | while |, then |, next | after | before | beside | next to | with | as |; |. |"
    ", but | when |, so | together with |, followed by | instead of | near ",
}
_CHINESE = {
    "opening": "镜下|此时|随后|首先|最后|术者|助手|主刀|医生|左手|右手|画面中|腹腔镜下|手术中|缓慢地|再次|"
    "小心|迅速|用|以|持|把|由|当|之前|同时|一把|细长的|弯曲的|黑色|白色|金属|正在|可见|已经|开始|继续",
    "acts": "靠近|伸入|进入|触碰|处理|分离|切开|游离|提起|推开|牵拉|贴着|沿着|离断|显露|闭合|剥离|移向|对准|"
    "压住|绕过|去除|修整|止血|切除|退出|拉出|放入|打开|抬起|放下|转动|停在|展开|缝合|结扎|取出|穿过|拨开|"
    "挡住|托住|检查|保护",
    "place": "组织|胆囊|肝脏|胆囊管|动脉|静脉|血管|腹膜|网膜|肠管|胃壁|脾脏|结肠|直肠|阑尾|粘连|脂肪|筋膜|"
    "肌肉|子宫|卵巢|输卵管|盆腔|系膜|腹壁|表面|创面|出血点|积血|血液|胆汁|液体|烟雾|肝床|边缘|视野|残端|瘢痕|"
    "息肉|囊肿|囊壁|纤维|间隙|输尿管|膀胱|肾脏|病变|缝线|血块|脓液|结石|切口|三角区|神经|腹腔|术野|镜头|肿瘤",
    "tail": "从左侧|从右侧|从上方|从下方|缓慢|轻轻|反复|随后停下|然后退出|直到看清|避免损伤|继续向前|"
    "保持视野|靠近边缘|配合|一旁|深处|中央|向上|向下|完成|逐步|逐层|没有出血|颜色发白|等待片刻|动作很稳|"
    "左右摆动|前后移动|便于操作",
    "join": "，|，|，|，随后|，再|，并|和|与|，同时|后|时|，由|，旁边|，接着|及|，最后|，而|，配合|，另一侧",
}


class RouterPrompt(NamedTuple):
    """A text and what a router should say of it: weights by name of an expert, summing to 1."""

    text: str
    weights: dict[str, float]


def router_prompts(experts: ExpertSet, seed: int = 0) -> list[RouterPrompt]:
    """Short prompts in the languages of the keywords, at most `MOST`; the same ones for the same seed.

    In each language every expert gets about as many as any other, and so does each form of its keywords; four
    of ten sentences name two experts, half each. Only texts are given in which the set's own search (`find`)
    sees exactly the experts that were meant; an expert whose words another's hide has none.
    """
    words = _Words(experts, random.Random(seed))
    wanted = min(MOST, sum(_PER_EXPERT for own in words.forms for forms in own.values() if forms))
    found: dict[str, dict[str, float]] = {}
    for text, index in words.alone(int(_ALONE * wanted)):
        _keep(found, experts, text, (index,))
    for text, named in words.sentences(_TRIES * wanted):
        if len(found) >= wanted:
            break
        _keep(found, experts, text, named)
    return [RouterPrompt(text, weights) for text, weights in found.items()]


def _keep(found: dict[str, dict[str, float]], experts: ExpertSet, text: str, named: tuple[int, ...]) -> None:
    names = [experts.names[index] for index in named]
    if experts.find(text).keys() == set(names):
        found.setdefault(text, {name: 1 / len(names) for name in names})


class _Words:
    """The keywords of a set in the forms that they have in a text, and the sentences around them."""

    def __init__(self, experts: ExpertSet, rng: random.Random) -> None:
        self.rng = rng
        self.forms = [_forms(expert) for expert in experts.experts]
        self._left: dict[tuple[int, bool], list[tuple[str, str]]] = {}

    def alone(self, most: int) -> Iterator[tuple[str, int]]:
        """Keywords by themselves, one of each expert in turn: (text, expert)."""
        own = [[word for forms in kinds.values() for word, _ in forms] for kinds in self.forms]
        turns = [
            (words[turn], index)
            for turn in range(most)
            for index, words in enumerate(own)
            if turn < len(words)
        ]
        yield from turns[:most]

    def sentences(self, count: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Sentences in turn about every expert, every pair and in every language: (text, experts)."""
        places = [(index, zh) for zh in (False, True) for index, own in enumerate(self.forms) if own[zh]]
        single = [((index,), zh) for index, zh in places]
        paired = []
        for pair in combinations(range(len(self.forms)), 2):
            common = [zh for zh in (False, True) if all(self.forms[index][zh] for index in pair)]
            paired += [(pair, zh) for zh in common or (False, True)]
        for number in range(count):
            turns = paired if paired and self.rng.random() < _TWO else single
            named, zh = turns[number % len(turns)]
            order = self.rng.sample(named, len(named))
            yield (self._chinese(order) if zh else self._english(order)), named

    def _next(self, index: int, zh: bool) -> tuple[str, str]:
        """A word of an expert and the kind of clause that it goes into: each form in its turn."""
        zh = zh if self.forms[index][zh] else not zh  # beside a word of another language
        left = self._left.setdefault((index, zh), [])
        if not left:
            left.extend(self.forms[index][zh])
            self.rng.shuffle(left)
        return left.pop()

    def _filler(self, words: Mapping[str, str]) -> Callable[[str], str]:
        return lambda slot: self.rng.choice(words[slot].split("|"))

    def _clause(self, long: tuple[str, ...], short: tuple[str, ...]) -> str:
        return self.rng.choice(short if self.rng.random() < _SHORT else long)

    def _english(self, named: list[int]) -> str:
        some = self._filler(_ENGLISH)
        clauses = []
        for index in named:
            word, kind = self._next(index, False)
            clauses.append(self._clause(_english_clauses(word, kind, some), _short_english(word, some)))
        text = some("join").join(clauses)
        text = f"{some('opening')} {text}" if self.rng.random() < 0.4 else text
        text = re.sub(r"\s+", " ", text).strip()
        return text[:1].upper() + text[1:] + "."

    def _chinese(self, named: list[int]) -> str:
        some = self._filler(_CHINESE)
        clauses = []
        for index in named:
            word, _ = self._next(index, True)
            clauses.append(self._clause(_chinese_clauses(word, some), _short_chinese(word, some)))
        text = some("join").join(clauses)
        more = (
            "",
            "",
            f"，{some('tail')}",
            f"，{some('acts')}{some('place')}",
            f"，{some('place')}{some('tail')}",
        )
        return text + self.rng.choice(more) + "。"


def _forms(expert: Expert) -> dict[bool, list[tuple[str, str]]]:
    """By language (True: Chinese), for each keyword its (form, kind of clause) pairs."""
    forms: dict[bool, list[tuple[str, str]]] = {False: [], True: []}
    for keyword in expert.keywords or (expert.name,):
        stem = keyword.rstrip("*")
        if _CJK.search(stem):
            forms[True].append((stem, "thing"))
        elif stem != keyword:
            endings = next(own for end, own in _ENDINGS if stem.endswith(end))
            forms[False] += [(stem + ending, kind) for ending, kind in endings]
        else:
            plural = () if stem[-1:] in ("s", "y") or not stem[-1:].isalpha() else ((f"{stem}s", "thing"),)
            forms[False] += [(stem, "thing"), *plural]
    return forms


def _english_clauses(word: str, kind: str, some: Callable[[str], str]) -> tuple[str, ...]:
    if kind == "does":
        return (
            f"the {some('who')} {word} the {some('place')} {some('tail')}",
            f"it {word} the {some('place')}",
        )
    if kind == "done":
        return (
            f"the {some('place')} is {word} {some('tail')}",
            f"{some('kind')} {some('place')} {word} by the {some('who')}",
        )
    if kind == "doing":
        return (
            f"{word} the {some('place')} {some('tail')}",
            f"the {some('who')} is {word} {some('det')} {some('place')}",
        )
    return (
        f"{some('det')} {some('kind')} {word} {some('acts')} the {some('place')} {some('tail')}",
        f"{some('det')} {word} {some('acts')} {some('det')} {some('place')}",
        f"the {some('place')} is {some('done')} with {some('det')} {word} {some('tail')}",
        f"{word} {some('tail')}",
        f"using {some('det')} {word} the {some('who')} {some('acts')} the {some('kind')} {some('place')}",
        f"{some('place')} and {some('place')} {some('done')} by {some('kind')} {word}",
    )


def _short_english(word: str, some: Callable[[str], str]) -> tuple[str, ...]:
    return (
        word,
        f"{some('det')} {word}",
        f"{word} {some('tail')}",
        f"{some('det')} {some('kind')} {word}",
        f"{some('place')} {word}",
        f"{word} the {some('place')}",
    )


def _chinese_clauses(word: str, some: Callable[[str], str]) -> tuple[str, ...]:
    return (
        f"{some('opening')}{word}{some('acts')}{some('place')}",
        f"{word}{some('acts')}{some('place')}",
        f"{word}{some('tail')}",
        f"{some('place')}{some('opening')}{word}",
        f"{some('place')}{word}{some('tail')}",
        f"{some('opening')}{word}{some('place')}",
        f"{some('acts')}{some('place')}{word}",
        f"{some('opening')}{some('tail')}{word}{some('place')}",
    )


def _short_chinese(word: str, some: Callable[[str], str]) -> tuple[str, ...]:
    return (
        word,
        f"{some('opening')}{word}",
        f"{word}{some('tail')}",
        f"{word}{some('acts')}",
        f"{some('place')}{word}",
        f"{word}{some('place')}",
    )
