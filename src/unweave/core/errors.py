"""One kind of error for the user's mistakes: it names the thing, where it is, and the remedy."""

from __future__ import annotations


class UnweaveError(Exception):
    """A fault that the user can fix. The command line prints it and leaves with exit status 2.

    ``what`` is one sentence on what is wrong, ``where`` the file, site or step, ``remedy`` what to do about it.
    """

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, str(where), remedy
        lines = [what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.what, self.where, self.remedy)


def _rebuild(what: str, where: str, remedy: str) -> UnweaveError:
    return UnweaveError(what, where=where, remedy=remedy)


class UnweaveWarning(UserWarning):
    """The work goes on, but its result should be read with this in mind."""
