"""Rewrites the generated part of a page, between `<!-- bench:begin -->` and `<!-- bench:end -->`."""

from __future__ import annotations


def replace_between(page: str, name: str, text: str) -> str:
    """The page with everything between the marks `<!-- name:begin -->` and `<!-- name:end -->` replaced.

    Raises:
        ValueError: the page does not have each mark exactly once, in order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"the page must have {begin} and {end} once each, in this order")
    head, _, rest = page.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}\n{text.strip()}\n{end}{tail}"
