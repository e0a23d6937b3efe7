"""A batch of requests from a file: one prompt a line, or one JSON object a line."""

from __future__ import annotations

import difflib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..moe_lora.errors import WanmoeError
from .timeline import parse_schedule


class Request(BaseModel):
    """One clip to generate; None takes the value of the command. The keys of a line of a .jsonl file."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid", frozen=True, strict=True)

    prompt: str = Field(min_length=1)
    instrument_hint: str | None = None
    """Name of the expert to route to."""
    mix: dict[str, float] | None = None
    """Weights of experts by name."""
    schedule: str | None = None
    """Experts over time, as "0:Hook, 40:Suction"; the numbers are frames of the video."""
    image_path: Path | None = None
    """First frame (i2v). This and the other paths are relative to the file."""
    last_image_path: Path | None = None
    """Last frame (i2v)."""
    negative_prompt: str | None = None
    seed: int | None = None
    output_path: Path | None = None
    num_frames: int | None = None
    """4n + 1."""
    video_size: tuple[int, int] | None = None
    """Height and width, multiples of 16."""
    num_steps: int | None = None
    guidance_scale: float | tuple[float, float] | None = None
    """One value, or [low, high] for the two noise experts."""
    flow_shift: float | None = None

    @field_validator("schedule")
    @classmethod
    def _readable(cls, schedule: str | None) -> str | None:
        if schedule is not None:
            parse_schedule(schedule)
        return schedule


def read_prompts(path: str | Path) -> list[Request]:
    """Requests of a .txt file (a prompt a line) or a .jsonl file (a `Request` a line), in order.

    Blank lines are skipped, in a .txt file lines that start with # too. Raises WanmoeError that names the
    file and the line: not readable, an unknown key (with the nearest one), a value that does not fit, an
    output file that two lines share.
    """
    path = Path(path)
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise WanmoeError(
            f"{path}: prompts are read from .txt (a prompt a line) or .jsonl (an object a line)"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise WanmoeError(f"{path}: cannot read the prompts ({error}); give a text file in UTF-8") from error
    requests: list[Request] = []
    outputs: dict[Path, int] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line:
            continue
        if path.suffix.lower() == ".jsonl":
            request = _from_json(line, path, number)
        elif line.startswith("#"):
            continue
        else:
            request = Request(prompt=line)
        requests.append(request)
        output = request.output_path
        if output is not None and outputs.setdefault(output, number) != number:
            raise WanmoeError(
                f"{path}:{number}: output_path {output} is that of line {outputs[output]} too; "
                "give each its own"
            )
    if not requests:
        raise WanmoeError(f"{path}: holds no prompt; write one a line")
    return requests


def _from_json(line: str, path: Path, number: int) -> Request:
    try:
        request = Request.model_validate_json(line)
    except ValidationError as error:
        raise WanmoeError(f"{path}:{number}: {_first_problem(error)}") from error
    except WanmoeError as error:
        raise WanmoeError(f"{path}:{number}: {error}") from error
    places = {
        key: path.parent / place
        for key in ("image_path", "last_image_path", "output_path")
        if (place := getattr(request, key)) is not None
    }
    return request.model_copy(update=places)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    if not problem["loc"]:
        return f"{problem['msg']}; a line is a JSON object with at least a prompt"
    key = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, Request.model_fields, n=1, cutoff=0.0)[0]
        return f"unknown key {key!r}; nearest is {near!r}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    return f"{key} is {problem['input']!r}: {problem['msg']}"
