"""A PostgreSQL server on loopback, for the tests of searches."""

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from cluster import free_port

PASSWORD = "geheim"


class Server:
    """A server with a database and a user of its own, in a temporary folder.

    Raises:
        pytest.skip.Exception: there are no server programs here, or no driver.
    """

    def __init__(self):
        pytest.importorskip("psycopg", reason="psycopg is not installed")
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        path = os.pathsep.join([os.environ["PATH"], *map(str, reversed(found))])
        self.programs = {name: shutil.which(name, path=path) for name in ("initdb", "pg_ctl")}
        if None in self.programs.values():
            pytest.skip("PostgreSQL's initdb and pg_ctl are not installed")
        self.user = None
        if os.geteuid() == 0:  # The server refuses to run as root.
            users = [each for each in pwd.getpwall() if each.pw_name in ("postgres", "nobody")]
            if not users:
                pytest.skip("no user but root to run PostgreSQL")
            self.user = users[-1].pw_name
        self.folder = Path(tempfile.mkdtemp(prefix="grap-solo-postgres"))
        if self.user is not None:
            shutil.chown(self.folder, self.user)
        self.port = free_port()
        self.url = f"postgresql://solo:{PASSWORD}@127.0.0.1:{self.port}/postgres"
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        self.call("initdb", "-U", "solo", "-A", "scram-sha-256", f"--pwfile={secret}", "--no-sync")
        self.start()

    def call(self, program, *arguments):
        command = [self.programs[program], "-D", self.folder / "data", *arguments]
        done = subprocess.run(
            command, user=self.user, cwd=self.folder, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=120, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def start(self):
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' "
        options += "-c fsync=off"
        # Its own stderr would keep ours open.
        self.call("pg_ctl", "-w", "-o", options, "-l", self.folder / "log", "start")

    def stop(self):
        self.call("pg_ctl", "-w", "-m", "fast", "stop")

    def remove(self):
        if (self.folder / "data" / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self.folder)
