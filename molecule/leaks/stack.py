"""The stack, its operator and its clients: whatever is said is kept, and every place can be searched."""

from __future__ import annotations

import base64
import http.client
import json
import shlex
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import playbooks
from allowed import ALLOWED
from canaries import Secret, Vault, patterns, private_key, sha256, verifier

ROOT = Path(__file__).resolve().parents[2]
SCENARIO = Path(__file__).resolve().parent
HOST = "single1"
SEARCH = (SCENARIO / "search.py").read_text()
SAMPLER = (SCENARIO / "sampler.py").read_text()
TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm")
SAMPLES = {"cmdline": "arguments", "environ": "environments", "file": "short-lived files", "period": "period"}
PSQL = "runuser -u postgres -- psql -At -d feast"
VIEWS = ["pg_stat_activity", "pg_settings", "pg_file_settings", "pg_hba_file_rules", "pg_db_role_setting", "pg_authid"]
REDIS = ("CONFIG GET *", "SLOWLOG GET -1", "ACL LIST", "ACL LOG")
# What HAProxy tells root on its socket.
HAPROXY = ("info", "stat", "env", "sess all", "table token_use", "map /etc/haproxy/tokens.map", "errors")
ASK_HAPROXY = """
import socket, sys
for what in sys.argv[1:]:
    with socket.socket(socket.AF_UNIX) as asked:
        asked.connect("/run/haproxy/admin.sock")
        asked.sendall(f"show {what}\\n".encode())
        while data := asked.recv(65536):
            print(data.decode(errors="replace"))
"""


class Capture(NamedTuple):
    """What some place held."""

    place: str
    content: bytes
    path: str
    mode: str


class Hit(NamedTuple):
    """A secret, and where it was."""

    secret: Secret
    place: str
    path: str
    owner: str
    mode: str

    def __str__(self) -> str:
        return f"{self.secret.name}: {self.place} {self.path} {self.owner} {self.mode}".strip()

    @property
    def allowed(self) -> bool:
        return any(entry.covers(self.place, self.path, self.owner, self.mode, self.secret.kind) for entry in ALLOWED)


class Run(NamedTuple):
    code: int
    output: str


class Stack:
    """One host with everything on it, and who uses it."""

    def __init__(self, inventory: Any, work: Path) -> None:
        self.inventory = inventory
        self.work = work
        self.vault = Vault(Path(inventory.path))
        self.started = time.time()
        self.secrets: dict[str | bytes, Secret] = {}
        self.captures: list[Capture] = []
        self.runs: dict[str, Run] = {}
        self.answers: dict[str, int] = {}

    def keep(self, place: str, content: str | bytes, path: str = "", mode: str = "") -> None:
        data = content.encode(errors="replace") if isinstance(content, str) else content
        self.captures.append(Capture(place, data, path, mode))

    def know(self, *found: Secret) -> None:
        for secret in found:
            self.secrets.setdefault(secret.value, secret)

    # The operator

    def playbook(
        self,
        label: str,
        name: str,
        *arguments: str,
        inventories: Sequence[Path] = (),
        variables: dict[str, Any] | None = None,
        password_file: Path | None = None,
    ) -> Run:
        """Run a playbook, as talkative as operators make it; variables go by a file, for they may be secrets."""
        paths = inventories or [ROOT / "molecule/shared/inventory", self.vault.inventory]
        extra, log = self.work / "variables.json", self.work / "ansible.log"
        extra.write_text(json.dumps(variables or {}))
        environment = playbooks.environment(ANSIBLE_LOG_PATH=str(log))
        if password_file:
            environment["ANSIBLE_VAULT_PASSWORD_FILE"] = str(password_file)
        began = time.monotonic()
        result = playbooks.run(
            name,
            *("-vvv", "--diff", f"--extra-vars=@{extra}", *arguments),
            inventories=paths,
            env=environment,
            one_stream=True,
        )
        print(f"{time.monotonic() - began:6.0f} s  {label}: {result.returncode}", flush=True)
        self.runs[label] = Run(result.returncode, result.stdout)
        self.keep("output", result.stdout, label)
        if log.exists():
            self.keep("log of Ansible", log.read_bytes(), label)
            log.unlink()
        return self.runs[label]

    def on_host(self, command: str, stdin: str = "") -> str:
        """Run a command as root. Only what is on its standard input may be secret."""
        try:
            return str(self.inventory.run(HOST, shlex.join(["sudo", "sh", "-c", f"cd /; {command}"]), stdin))
        except subprocess.CalledProcessError as error:
            raise AssertionError(f"{command}: {error.stderr}") from None

    def say(self, label: str, command: str) -> None:
        """Keep all that a command on the host prints, whether or not it succeeds."""
        self.keep("commands", self.on_host(f"{{ {command}; }} 2>&1 || true"), label)

    # Clients

    @property
    def tokens(self) -> dict[str, str]:
        """The current token of each role."""
        values = self.vault.read()["gateway_tokens"]
        return {role: value[0] if isinstance(value, list) else value for role, value in values.items()}

    def ask(self, label: str, path: str, token: str | None, body: Any = None) -> int:
        """Ask the gateway; keep its answer and return the status, 0 where there is none."""
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"https://{self.inventory.address(HOST)}:8443{path}", data)
        request.add_header("Content-Type", "application/json")
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        context = ssl.create_default_context(cafile=str(self.vault.inventory / "ca.crt"))
        try:
            with urllib.request.urlopen(request, timeout=60, context=context) as answer:
                status, said = answer.status, bytes(answer.headers) + answer.read()
        except urllib.error.HTTPError as error:
            status, said = error.code, bytes(error.headers) + error.read()
        except (OSError, http.client.HTTPException) as error:
            status, said = 0, str(error).encode()
        self.answers[label] = int(status)
        self.keep("HTTP", said, label)
        return self.answers[label]

    def ask_wrongly(self, label: str, token: str) -> None:
        """Send the gateway a request with a token that is no HTTP; keep its answer."""
        context = ssl.create_default_context(cafile=str(self.vault.inventory / "ca.crt"))
        address = self.inventory.address(HOST)
        with (
            socket.create_connection((address, 8443), 60) as plain,
            context.wrap_socket(plain, server_hostname=address) as wrapped,
        ):
            wrapped.sendall(f"GET /health HTTP/1.1\r\nAuthorization: Bearer {token}\r\nno header\r\n\r\n".encode())
            said = wrapped.recv(65536)
        self.answers[label] = int(said.split()[1])
        self.keep("HTTP", said, label)

    def read(self, label: str, token: str | None = None, feature: str = "ohlcv_features:close") -> int:
        body = {"features": [feature], "entities": {"symbol": ["AAPL"]}}
        return self.ask(label, "/get-online-features", token or self.tokens["reader"], body)

    def wait_until_it_serves(self, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while self.read("read again") != 200:
            assert time.monotonic() < deadline, f"nothing is served within {seconds:.0f} s"
            time.sleep(1)

    # Administrators

    def redis(self, purpose: str, *commands: str) -> str:
        """Ask Redis on its socket as the user of a purpose."""
        lines = [self._redis_login(purpose), *commands]
        return self.on_host("redis-cli -s /run/redis/redis.sock", "\n".join(lines) + "\n")

    def _redis_login(self, purpose: str) -> str:
        users = self.on_host(f"grep -oE '^user {purpose}(_g[0-9a-f]{{8}})? ' /etc/redis/users.acl").split()
        password = self._maintenance() if purpose == "maintenance" else self.vault.read()["redis_passwords"][purpose]
        return f'AUTH {users[1]} "' + "".join(f"\\x{byte:02x}" for byte in password.encode()) + '"'

    def _maintenance(self) -> str:
        file = "/etc/credstore.encrypted/redis.maintenance"
        return self.on_host(f"[ ! -e {file} ] || systemd-creds decrypt --name=redis.maintenance {file} -").strip()

    @contextmanager
    def monitored(self) -> Iterator[None]:
        """Keep what Redis shows an administrator of every command while the block runs."""
        shell = "echo $$; exec redis-cli -s /run/redis/redis.sock"
        command = self.inventory.argv(HOST, shlex.join(["sudo", "sh", "-c", shell]))
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin
            assert process.stdout
            number = int(process.stdout.readline())
            process.stdin.write(f"{self._redis_login('admin')}\nMONITOR\n")
            process.stdin.flush()
            assert [process.stdout.readline() for _ in range(2)] == ["OK\n", "OK\n"], "no MONITOR"
            try:
                yield
            finally:
                # The process may have ended by itself.
                self.on_host(f"kill {number} || true")
                self.keep("MONITOR", process.stdout.read())

    # What is secret

    def learn(self, when: str) -> None:
        """Know the vault's secrets of now, and those that the host made for itself."""
        self.know(*self.vault.secrets(when))
        for block in self.on_host("cd /etc/larder/tls && tail -n +1 */*/tls.key").split("==> ")[1:]:
            path, _, pem = block.partition(" <==\n")
            self.know(*private_key(f"the private key in {path}", "key", pem.strip()))
        if maintenance := self._maintenance():
            name = "the password of maintenance in Redis"
            self.know(Secret(name, "password", maintenance), sha256(name, maintenance))
        verifiers = "SELECT rolname, rolpassword FROM pg_authid WHERE rolpassword IS NOT NULL"
        for line in self.on_host(f"{PSQL} -c '{verifiers}'").splitlines():
            self.know(*verifier(*line.split("|")))
        key = base64.b64decode(self.on_host("base64 /var/lib/systemd/credential.secret"))
        # The file begins with the identity of the machine.
        self.know(Secret("the key of the credentials on the host", "host", key[-256:]))

    # Every place

    @contextmanager
    def sampled(self) -> Iterator[None]:
        """Watch processes and short-lived files, here and on the host, while the block runs."""
        sampler = ["python3", "-c", SAMPLER]
        there = shlex.join(["sudo", *sampler, *TEMPORARY, "/root/.ansible", "/home"])
        commands = {
            "controller": [*sampler, str(Path.home() / ".ansible/tmp")],
            "host": self.inventory.argv(HOST, there),
        }
        running = {}
        for where, command in commands.items():
            output = (self.work / f"sampled.{where}").open("w+b")
            running[where] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output), output
        try:
            yield
        finally:
            for where, (process, output) in running.items():
                process.communicate(timeout=60)
                output.seek(0)
                for record in map(json.loads, output):
                    content = base64.b64decode(record["content"])
                    self.keep(f"{where}: {SAMPLES[record['kind']]}", content, record["path"], record["mode"])
                output.close()

    def ask_services(self) -> None:
        """Keep what the host and its services tell administrators."""
        # The output is not text: a field may hold any bytes.
        journal = self.on_host("journalctl --output=export --all --no-pager | base64 --wrap=0")
        self.keep("journal", base64.b64decode(journal))
        self.keep("systemctl show", self.on_host("systemctl show --all '*'"))
        # Units without a file are in the list too, and fail it.
        self.keep("systemctl cat", self.on_host("systemctl cat '*' 2> /dev/null || true"))
        extensions = self.on_host(f"{PSQL} -c 'SELECT extname FROM pg_extension'").split()
        for view in (*VIEWS, *({"pg_stat_statements"} & set(extensions))):
            self.keep(view, self.on_host(f"{PSQL} -c 'TABLE {view}'"))
        for command in REDIS:
            self.keep(command, self.redis("admin", command))
        for what in HAPROXY:
            self.keep(f"HAProxy: {what}", self.on_host(f"python3 - {shlex.quote(what)}", ASK_HAPROXY))

    def keep_history(self, repository: Path) -> None:
        """Keep every version of every file that git has, and what waits to be committed."""
        for command in (["log", "-p", "--all", "--reflog"], ["diff", "HEAD"]):
            said = subprocess.run(["git", *command], cwd=repository, stdout=subprocess.PIPE, check=True).stdout
            self.keep("git", said, repository.name)

    def scan(self) -> tuple[list[Hit], dict[str, int]]:
        """Search everything that was kept, and the files of both ends, for every known secret.

        Return what was found where, and the size of each place: bytes, or files.
        """
        found = patterns(self.secrets.values())
        captures = self.work / "captures"
        captures.mkdir()
        for number, capture in enumerate(self.captures):
            (captures / str(number)).write_bytes(capture.content)

        wanted = [base64.b64encode(pattern).decode() for pattern in found]

        def search(run: Callable[[str], str], roots: list[str], **request: Any) -> Any:
            return json.loads(run(json.dumps({"patterns": wanted, "roots": roots, **request})))

        def here(request: str) -> str:
            command = [sys.executable, str(SCENARIO / "search.py")]
            return subprocess.run(command, input=request, stdout=subprocess.PIPE, text=True, check=True).stdout

        def there(request: str) -> str:
            return str(self.inventory.run(HOST, shlex.join(["sudo", "python3", "-c", SEARCH]), request))

        # A file that was there before the first secret holds none.
        since = (self.vault.inventory / ".vault_password").stat().st_ctime - 60
        roots = [*TEMPORARY, "/var/log", str(Path.home() / ".ansible"), str(ROOT)]
        # Other checkouts may be at work in a temporary directory; an environment holds packages alone.
        others = [str(self.work), "*/.venv"]
        kept = search(here, [str(captures)])
        answers = {
            "controller: files": search(here, roots, pruned=others, since=since),
            "host: files": search(there, ["/"], pruned=["/proc", "/sys"], since=since),
        }
        # What client_config.yml wrote is in the directory that holds the evidence.
        if (self.work / "client").exists():
            answers["controller: files"]["hits"] += search(here, [str(self.work / "client")])["hits"]

        hits: set[Hit] = set()
        sizes: dict[str, int] = {}
        for capture in self.captures:
            sizes[capture.place] = sizes.get(capture.place, 0) + len(capture.content)
        for hit in kept["hits"]:
            capture = self.captures[int(Path(hit["path"]).name)]
            for match in hit["matches"]:
                hits.add(Hit(found[base64.b64decode(match)], capture.place, capture.path, "", capture.mode))
        for place, answer in answers.items():
            sizes[place] = answer["files"]
            for hit in answer["hits"]:
                for match in hit["matches"]:
                    hits.add(Hit(found[base64.b64decode(match)], place, hit["path"], hit["owner"], hit["mode"]))
        return sorted(hits, key=str), sizes
