"""The sources keep to the limits that `tests/counts.py` counts; the limits only ever fall."""

import pytest

from tests.counts import count_rooms, count_text, total

ANY_PERCENT = 3.0
IGNORES = 8
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()


def test_sources_keep_to_the_limits():
    counts = total(count_rooms())
    assert counts.any_percent <= ANY_PERCENT
    assert counts.ignores <= IGNORES
    assert set(counts.long_files) <= LONG_FILES
    assert set(counts.long_functions) <= LONG_FUNCTIONS


@pytest.mark.parametrize(
    ("source", "annotations", "any_"),
    [
        ("def f(a: int, b: Any, *, c: dict[str, Any]) -> None: ...", 4, 2),
        ("def f(*args: Any, **kwargs: Any) -> None: ...", 1, 0),
        ("def f(*args: int, **kwargs: dict[str, Any]) -> None: ...", 3, 1),
        ("x: 'list[Any]' = []\ny: Literal['any', 'no name'] = 'any'", 2, 1),
        ("class A:\n    x: typing.Any\n    y: int = 0", 2, 1),
        ("x = 1\nf = lambda y: y", 0, 0),
    ],
)
def test_annotations_are_counted(source, annotations, any_):
    counts = count_text("a.py", source)
    assert (counts.annotations, counts.any) == (annotations, any_)


def test_comments_lines_and_lengths_are_counted():
    source = "x = f()  # type: ignore[arg-type]\ny = '# type: ignore'\n" + "def f():\n" + "    pass\n" * 60
    counts = count_text("room/a.py", source)
    assert (counts.ignores, counts.lines, counts.long_functions, counts.long_files) == (1, 63, {"room/a.py:f": 61}, {})
    assert count_text("room/a.py", "\n" * 451).long_files == {"room/a.py": 451}
