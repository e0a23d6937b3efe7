"""Fonts that draw Chinese, which matplotlib's own does not."""

from matplotlib.font_manager import get_font_names

_CHINESE = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Serif CJK SC", "Source Han Sans SC"),
    *("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC", "Hiragino Sans GB"),
    *("SimHei", "SimSun", "Heiti TC", "Arial Unicode MS", "Droid Sans Fallback", "AR PL UMing CN"),
)


def chinese_fonts() -> list[str]:
    """Those of them that are installed, best first; [] where none is."""
    known = set(get_font_names())
    return [font for font in _CHINESE if font in known]
