"""Errors a user can act on: each says what is wrong, where, and the remedy.

The command line turns them into one message and an exit code (2: the user's mistake, 3: damaged data
or store, 1: our own fault); Python callers catch `CdistError` or one of its subclasses.
"""


class CdistError(Exception):
    """Base of every error cdist raises on purpose.

    Args:
        what: what is wrong, one sentence.
        where: the place: a path, `shard, key, field`, a recipe key. Empty where `what` names it already.
        remedy: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(what, where, remedy)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return "\n".join(lines)

    def __reduce__(
        self,
    ) -> tuple:  # keyword-only arguments would be lost between loader workers and the trainer
        return _rebuild, (type(self), self.what, self.where, self.remedy)


def _rebuild(kind: type[CdistError], what: str, where: str, remedy: str) -> CdistError:
    return kind(what, where=where, remedy=remedy)


class UsageError(CdistError):
    """A wrong path, option, model kind or recipe: the user's mistake."""

    exit_code = 2


class DataError(CdistError):
    """A shard or sample that cannot be used as it is. `key` is the sample's, where one sample is to blame."""

    exit_code = 3
    key = ""


class StoreError(CdistError):
    """A store that is damaged, incomplete, or not what its manifest says."""

    exit_code = 3


class MismatchError(CdistError):
    """Two things that must agree do not (store and shards, store and student, two fingerprints)."""

    exit_code = 2
