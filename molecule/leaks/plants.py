"""Canaries that are leaked on purpose, one for each kind of place and each form: a scan must find them all."""

from __future__ import annotations

import base64
import json
import os
import secrets
import subprocess
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from canaries import Secret, alphanumeric
from stack import HOST, PSQL, SCENARIO, Stack


def awkward(length: int = 24) -> str:
    """Return nothing but characters that escapes touch, so that the escaped form alone can betray it."""
    return "".join(secrets.choice("'\"\\$%,#:@/é€🔑&<") for _ in range(length))


# Each form in a file on the host: how it is written, and what kind of canary shows it.
FORMS: dict[str, tuple[Callable[[str], bytes], Callable[[], str]]] = {
    "as it is": (str.encode, awkward),
    "its first 12 characters": (lambda text: text[:12].encode(), alphanumeric),
    "its last 17 characters": (lambda text: text[-17:].encode(), lambda: alphanumeric(40)),
    "Base64": (lambda text: base64.b64encode(f"{text}.".encode()), awkward),
    "Base64 after one character": (lambda text: base64.b64encode(f":{text}.".encode()), awkward),
    "Base64 after two characters": (lambda text: base64.b64encode(f"::{text}.".encode()), awkward),
    "Base64 in lines": (lambda text: base64.encodebytes(b"x" * 50 + text.encode()), lambda: alphanumeric(60)),
    "quoted for a URL": (lambda text: quote(text, safe="").encode(), awkward),
    "JSON": (lambda text: json.dumps(text).encode(), awkward),
    "JSON with every character escaped": (
        lambda text: "".join(f"\\u{ord(c):04x}" for c in text).encode(),
        lambda: alphanumeric(30),
    ),
    "YAML with every character escaped": (
        lambda text: "".join(f"\\U{ord(c):08x}" for c in text).encode(),
        awkward,
    ),
    "Python": (lambda text: repr(text).encode(), awkward),
    "hexadecimal": (lambda text: text.encode().hex().encode(), awkward),
    "in the middle of a large file": (
        lambda text: secrets.token_bytes(3_000_000) + text.encode() + secrets.token_bytes(3_000_000),
        awkward,
    ),
}

# For every other plant, the places where the scan must find it.
PLACES: dict[str, set[str]] = {
    "task that prints": {"output", "log of Ansible"},
    "task that shows a difference": {"output", "controller: short-lived files", "host: short-lived files"},
    "task with an environment": {"host: environments"},
    "task with arguments": {"host: arguments"},
    "task whose module logs": {"journal"},
    "arguments on the host": {"host: arguments"},
    "environment on the host": {"host: environments"},
    "arguments on the controller": {"controller: arguments"},
    "environment on the controller": {"controller: environments"},
    "journal": {"journal"},
    "long message in the journal": {"journal"},
    "unit": {"systemctl show", "systemctl cat"},
    "log of PostgreSQL": {"host: files"},
    "setting of PostgreSQL": {"pg_settings", "pg_db_role_setting"},
    "file of settings of PostgreSQL": {"pg_file_settings", "host: files"},
    "session of PostgreSQL": {"pg_stat_activity"},
    "slow log of Redis": {"SLOWLOG GET -1"},
    "append-only file of Redis": {"host: files"},
    "MONITOR of Redis": {"MONITOR"},
    "setting of Redis": {"CONFIG GET *"},
    "refusals of Redis": {"ACL LOG"},
    "answer of the gateway": {"HTTP"},
    "output of a command": {"commands"},
    "metric": {"host: files"},
    "core file": {"host: files"},
    "file in the checkout": {"controller: files"},
    "temporary file of the controller": {"controller: files"},
    "commit that was taken back": {"git"},
}
# These processes last as long as a short task.
MOMENT = "import time; time.sleep(0.3)"


class Plants:
    """Plants a canary in each place of a stack."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._files: list[Path] = []

    def _canary(self, name: str, make: Callable[[], str] = lambda: alphanumeric(36)) -> str:
        value = make()
        self._stack.know(Secret(name, "planted", value))
        return value

    def _on_host(self, name: str, script: str) -> str:
        """Run a script on the host with the canary in $c; it comes on standard input."""
        return self._stack.on_host(f"read -r c; {script}", f"{self._canary(name)}\n")

    def plant(self) -> None:
        for number, (form, (write, make)) in enumerate(FORMS.items()):
            content = base64.b64encode(write(self._canary(form, make))).decode()
            self._stack.on_host(f"base64 -d > /var/lib/planted.{number}", content)
        self._tasks()
        self._processes()
        self._services()
        self._redis()
        self._controller()

    def _tasks(self) -> None:
        variables = {
            "planted_message": self._canary("task that prints"),
            "planted_content": self._canary("task that shows a difference"),
            "planted_environment": self._canary("task with an environment"),
            "planted_argument": self._canary("task with arguments"),
            "planted_command": self._canary("task whose module logs"),
        }
        run = self._stack.playbook("tasks that leak", str(SCENARIO / "plant.yml"), variables=variables)
        assert run.code == 0, run.output

    def _processes(self) -> None:
        self._on_host("arguments on the host", f"python3 -c '{MOMENT}' \"$c\"")
        self._on_host("environment on the host", f"X=$c python3 -c '{MOMENT}'")
        subprocess.run(["python3", "-c", MOMENT, self._canary("arguments on the controller")], check=True)
        environment = os.environ | {"X": self._canary("environment on the controller")}
        subprocess.run(["python3", "-c", MOMENT], env=environment, check=True)

    def _services(self) -> None:
        self._on_host("journal", "echo $c | systemd-cat")
        self._on_host("long message in the journal", "echo $(seq 3000) $c $(seq 3000) | systemd-cat")
        self._on_host("unit", "systemd-run --quiet --unit=planted --property=Environment=X=$c sleep 3600")
        # The statement has to fail: PostgreSQL logs a failed statement with its text.
        self._on_host("log of PostgreSQL", f"echo \"SELECT '$c' FROM nothing\" | {PSQL} || true")
        self._on_host("setting of PostgreSQL", f"echo \"ALTER DATABASE feast SET backtrace_functions = '$c'\" | {PSQL}")
        file = "/etc/postgresql/17/main/conf.d/planted.conf"
        self._on_host("file of settings of PostgreSQL", f"echo \"planted.y = '$c'\" > {file}; chmod 644 {file}")
        session = f"systemd-run --quiet --setenv=PGAPPNAME=$c {PSQL} -c 'SELECT pg_sleep(600)'"
        self._on_host("session of PostgreSQL", session)
        self._on_host("metric", 'echo "planted{x=\\"$c\\"} 1" > /var/lib/larder/metrics/planted.prom')
        # Where this machine's kernel hands cores to a program of its own, the file is made by hand. (sudo allows none.)
        self._on_host(
            "core file",
            # The process has to abort, because an abort leaves a core.
            "mkdir /var/lib/planted; systemd-run --quiet --wait --property=LimitCORE=infinity --setenv=X=$c"
            " --working-directory=/var/lib/planted python3 -c 'import os; os.abort()' || true;"
            " [ -e /var/lib/planted/core* ] || echo $c > /var/lib/planted/core",
        )
        self._stack.say("planted", f"echo {self._canary('output of a command')}")
        self._stack.read("planted", feature=f"{self._canary('answer of the gateway')}:close")

    def _redis(self) -> None:
        redis = self._stack.redis
        redis("maintenance", "CONFIG SET slowlog-log-slower-than 0")
        redis("admin", f"TYPE {self._canary('slow log of Redis')}")
        redis("maintenance", "CONFIG SET slowlog-log-slower-than 10000")
        redis("materialize", f"HSET {self._canary('append-only file of Redis')} x y")
        with self._stack.monitored():
            redis("admin", f"TYPE {self._canary('MONITOR of Redis')}")
        redis("maintenance", f'CONFIG SET proc-title-template "{{title}} {self._canary("setting of Redis")}"')
        redis("admin", f"AUTH {self._canary('refusals of Redis')} x")

    def _controller(self) -> None:
        stack = self._stack
        key = stack.inventory.variables(HOST)["ansible_ssh_private_key_file"]
        self._files = [Path(key).with_name("planted"), Path.home() / ".ansible/tmp/planted"]
        for file, name in zip(self._files, ("file in the checkout", "temporary file of the controller"), strict=True):
            file.write_text(self._canary(name))
        repository = stack.work / "repository"
        repository.mkdir()
        (repository / "notes").write_text(self._canary("commit that was taken back"))
        author = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        for command in ("init -q", "add notes", "commit -qm notes", "rm -q notes", "commit -qm none"):
            subprocess.run(["git", *author, *command.split()], cwd=repository, check=True)
        stack.keep_history(repository)

    def remove(self) -> None:
        """Take back what was planted on the controller; the host is removed as a whole."""
        for file in self._files:
            file.unlink(missing_ok=True)
