"""Captions of the drawn scenes, in English and Chinese.

Each names its instrument with words of exactly one expert's keyword table (those of a scene without
instrument with none at all), and says from which side it comes: what a caption says is true of its clip.
"""

import numpy as np

_SIDES = {
    "left": ("left", "左侧"),
    "right": ("right", "右侧"),
    "top": ("top", "上方"),
    "bottom": ("bottom", "下方"),
}

_ENGLISH = {
    "Scissors": (
        "Scissors enter from the {side} and cut the tissue.",
        "A pair of scissors coming from the {side} opens and closes its blades.",
        "From the {side}, surgical scissors snip across the red tissue.",
        "The scissors advance from the {side}, blades opening and shutting.",
        "Steel scissors reach in from the {side} to divide the membrane.",
    ),
    "Hook/Electrocautery": (
        "An electrocautery hook sweeps in from the {side} and burns the tissue.",
        "The hook, coming from the {side}, swings and sparks at its tip.",
        "From the {side} a black hook cauterizes the surface with a bright glow.",
        "Cautery: the hook enters at the {side} and moves from side to side.",
        "A glowing electrocautery hook dissects from the {side}.",
    ),
    "Suction": (
        "A suction tube enters from the {side} and clears the fluid.",
        "The suction probe slides in and out from the {side}.",
        "From the {side}, a thick white suction cannula with holes probes the tissue.",
        "Suction from the {side}: the tube aspirates along the surface.",
        "The suction irrigator reaches in from the {side} and moves back and forth.",
    ),
    "Other": (
        "A grasper enters from the {side}, closes its jaws and pulls.",
        "Brass forceps from the {side} grip the tissue and draw it back.",
        "From the {side} the grasper grasps a fold and retreats.",
        "The forceps come in from the {side}, bite once and pull aside.",
        "A toothed grasper at the {side} closes on the tissue and tugs.",
    ),
    "": (
        "Moist red tissue moves slowly under the endoscope.",
        "The camera drifts over pink tissue with thin veins.",
        "Tissue rises and falls with each breath.",
        "A quiet view of the abdominal wall, nothing is being done.",
        "Yellow fat and red muscle in soft light.",
        "The surface of the organ glistens as the camera turns.",
    ),
}

_CHINESE = {
    "Scissors": (
        "剪刀从{side}进入，剪切组织。",
        "手术剪刀由{side}伸入，刀片一张一合。",
        "剪刀自{side}靠近，剪开红色的膜。",
        "从{side}来的剪刀剪断组织。",
        "{side}的剪刀缓慢推进并剪切。",
    ),
    "Hook/Electrocautery": (
        "电凝钩从{side}进入，烧灼组织。",
        "电凝钩由{side}伸入，左右摆动，尖端发光。",
        "黑色电凝钩自{side}靠近，电凝止血。",
        "从{side}来的电凝钩来回扫动。",
        "{side}的电凝钩冒出火花，烧灼表面。",
    ),
    "Suction": (
        "吸引器从{side}进入，吸出液体。",
        "吸引器由{side}伸入，前后移动。",
        "带孔的白色吸引器自{side}靠近，清理术野。",
        "从{side}来的吸引器吸引积液。",
        "{side}的吸引器沿轴向反复探入。",
    ),
    "Other": (
        "抓钳从{side}进入，闭合后牵拉组织。",
        "抓钳由{side}伸入，夹持组织并后退。",
        "黄铜色抓钳自{side}靠近，夹持一次后拉开。",
        "从{side}来的镊子夹持组织。",
        "{side}的带齿抓钳闭合并回拉。",
    ),
    "": (
        "湿润的红色组织在镜下缓慢移动。",
        "镜头掠过粉色组织，可见细小血管。",
        "组织表面轻轻起伏。",
        "腹腔内视野平静，没有操作。",
        "柔光下的黄色脂肪与红色肌肉。",
        "镜头转动，器官表面泛着光泽。",
    ),
}


def captions(instrument: str, side: str, rng: np.random.Generator) -> tuple[str, str]:
    """An English and a Chinese caption of a scene; `instrument` "" is a scene without one."""
    english, chinese = _SIDES.get(side, ("", ""))
    pick = int(rng.integers(len(_ENGLISH[instrument])))
    return _ENGLISH[instrument][pick].format(side=english), _CHINESE[instrument][pick].format(side=chinese)
