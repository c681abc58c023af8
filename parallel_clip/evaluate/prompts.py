"""Prompt templates and class names for zero-shot classification."""

import logging
from pathlib import Path

from parallel_clip.errors import InputError

log = logging.getLogger(__name__)

DEFAULT_TEMPLATES = (
    "{}",
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture of a {}.",
    "a close-up of a {}.",
    "a drawing of a {}.",
    "an icon of a {}.",
)


def read_templates(choice: str | Path | None = None) -> list[str]:
    """Read prompt templates, each with `{}` where the class name goes.

    choice: None for `DEFAULT_TEMPLATES`; `"openai"` for the 80 templates that OpenAI published for
    ImageNet, taken from an installed `open_clip`; else a file with one template a line.

    Raises:
        InputError: the file or `open_clip` is missing, or a line has no `{}`.
    """
    if choice is None:
        return list(DEFAULT_TEMPLATES)
    if str(choice) == "openai":
        try:
            from open_clip import OPENAI_IMAGENET_TEMPLATES
        except ImportError as error:
            raise InputError(
                "the templates 'openai' are those of the package open_clip, which is not "
                "installed: `pip install open_clip_torch`, or give a file with one template a "
                "line, or none for the short list that comes with parallel_clip"
            ) from error
        return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    lines = _read_lines(Path(choice), "templates")
    for number, line in enumerate(lines, start=1):
        if "{}" not in line:
            raise InputError(
                f"line {number} of {choice} is {line!r}, a template without {{}}; every line needs "
                "{} where the class name goes, as in 'a photo of a {}.'"
            )
    return lines


def read_classes(path: str | Path) -> list[str]:
    """Read class names, one a line; line i, counted from 0, is class i.

    A name that comes twice is only warned of: OpenAI's own names for ImageNet have "missile" and
    "sunglasses" twice.

    Raises:
        InputError: the file is missing or empty, or a line in it is empty.
    """
    names = _read_lines(Path(path), "class names")
    first_line: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name:
            raise InputError(
                f"line {number} of {path} is empty, yet line {number} is the name of class "
                f"{number - 1}; write a name there, or remove the line and renumber the labels"
            )
        if name in first_line:
            log.warning(
                "lines %d and %d of %s are both %r: no prompt tells these two classes apart, and "
                "the first is always preferred",
                first_line[name],
                number,
                path,
                name,
            )
        first_line.setdefault(name, number)
    return names


def fill(template: str, name: str) -> str:
    """Put a class name into a template. Braces other than `{}` are left as they are."""
    return template.replace("{}", name)


def _read_lines(path: Path, what: str) -> list[str]:
    """Read a UTF-8 text file: its stripped lines, without the empty ones at its end."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the {what} from {path}: {error}; it must be a UTF-8 text file with one "
            "a line"
        ) from error
    lines = [line.strip() for line in text.rstrip().split("\n")]
    if lines == [""]:
        raise InputError(f"{path} is empty; it must hold {what}, one a line")
    return lines
