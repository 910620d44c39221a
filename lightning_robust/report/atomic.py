"""Files that are either there and whole, or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Lend the name of a temporary file that takes the place of ``path`` once it is written.

    A reader, or a run that is killed half-way, never sees a half-written file; after an exception the old file is as it
    was and the temporary one is gone. Missing folders are made.

    Args:
        path: the file to write.

    Yields:
        A path in the same folder, with the same suffix.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "tables" / "one.csv"
        >>> with atomic_file(target) as temporary:
        ...     _ = temporary.write_text("a,b")
        >>> target.read_text(), len(list(target.parent.iterdir()))
        ('a,b', 1)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name of our own and not tempfile's, whose files only their owner may read
    temporary = path.with_name(f".{path.stem}.{uuid4().hex}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
