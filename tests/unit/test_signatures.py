"""What the library's public names say in their signatures: types that tell, and are there to be had."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import pytest

import incdump
from incdump.images import images_dir
from incdump.model import options, precopy

if TYPE_CHECKING:
    from collections.abc import Iterator

STANDARD = {
    "Any", "AsyncGenerator", "Awaitable", "BaseException", "Callable", "ClassVar", "EllipsisType", "Iterable",
    "Iterator", "Mapping", "NDArray", "None", "OSError", "Path", "PathLike", "Self", "Sequence", "TracebackType",
}  # fmt: skip
OWN = {"__init__", "__aenter__", "__aexit__", "__enter__", "__exit__", "__aiter__", "__anext__", "__post_init__"}


def written(annotations: dict[str, Any]) -> dict[str, str]:
    """Annotations as they are written."""
    return {name: str(getattr(value, "__forward_arg__", value)) for name, value in annotations.items()}


def signatures(name: str) -> Iterator[tuple[str, dict[str, str]]]:
    """What a public name, and everything public that it has, is annotated with: texts, as they are written."""
    value: Any = getattr(incdump, name)
    if inspect.isfunction(value):
        yield name, written(value.__annotations__)
    if not inspect.isclass(value):
        return
    for owner in value.__mro__:
        if not owner.__module__.startswith("incdump"):
            continue
        yield (
            f"{name} ({owner.__name__})",
            written(vars(owner).get("__annotations__", {})),
        )
        for attribute, member in vars(owner).items():
            if attribute.startswith("_") and attribute not in OWN:
                continue
            function = getattr(member, "fget", None) or getattr(member, "__func__", None) or member
            if inspect.isfunction(function):
                yield f"{name}.{attribute}", written(function.__annotations__)


ALL = [(where, annotated) for name in incdump.__all__ for where, annotated in signatures(name)]


def test_there_is_something_to_look_at() -> None:
    assert len(ALL) > 100
    assert {"Session.dump", "PageServer.__aexit__", "migrate", "InvalidOption.__init__"} <= {where for where, _ in ALL}


@pytest.mark.parametrize(("where", "annotated"), ALL, ids=[where for where, _ in ALL])
def test_no_public_signature_says_that_anything_will_do(where: str, annotated: dict[str, str]) -> None:
    vague = {name: text for name, text in annotated.items() if re.search(r"\bobject\b", text)}
    assert vague == {}


@pytest.mark.parametrize(("where", "annotated"), ALL, ids=[where for where, _ in ALL])
def test_every_type_of_incdumps_own_that_a_signature_names_is_exported(where: str, annotated: dict[str, str]) -> None:
    """Choices of texts (`Literal`) may stay where they are: their values are in the documentation."""
    known = {**vars(options), **vars(precopy), **vars(images_dir)}
    for text in annotated.values():
        for word in re.findall(r"\b[A-Z]\w+\b", re.sub(r"Literal\[[^\]]*\]", "", text)):
            choices = "Literal" in str(known.get(word))
            assert word in incdump.__all__ or word in STANDARD or choices, f"{where} names {word}"
