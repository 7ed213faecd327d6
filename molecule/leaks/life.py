"""What happens to a stack: deployment, work, clients who err, faults, crashes, runs that fail, a rotation."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from urllib.parse import quote

from canaries import AWKWARD_TOKEN, Secret, Vault, alphanumeric, canary
from stack import SCENARIO, Stack

UNITS = ("postgresql@17-main", "redis-server", "feature-server@1", "push-server@1", "haproxy")
# Memory that the kernel wrote down when a process died: an ELF file of type 4.
FIND_CORES = """
import os, stat, sys
for parent, directories, names in os.walk("/"):
    if parent == "/":
        directories[:] = set(directories) - {"proc", "sys", "dev"}
    for path in (f"{parent}/{name}" for name in names):
        try:
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode) and status.st_ctime > float(sys.argv[1]):
                with open(path, "rb") as file:
                    if file.read(18)[::16] == b"\\x7f\\x04":
                        print(path)
        except OSError:
            pass
"""


def a_push() -> dict[str, object]:
    """Return a push that nothing is wrong with, so that it reaches the stores."""
    now = datetime.now(UTC).isoformat()
    row: dict[str, object] = dict.fromkeys(("open", "high", "low", "close", "bid", "ask", "spread"), 1.0)
    row |= {"symbol": "AAPL", "event_timestamp": now, "created": now, "volume": 1}
    df = {name: [value] for name, value in row.items()}
    return {"push_source_name": "market_data_push_source", "to": "online_and_offline", "df": df}


def deploy(stack: Stack) -> None:
    fresh = stack.work / "fresh"
    fresh.mkdir()
    (fresh / "hosts.yml").write_text((SCENARIO / "inventory/hosts.yml").read_text())
    # The scenario's own vault was made by molecule, unseen.
    nothing = stack.work / "nothing"
    nothing.write_text("none\n")
    stack.playbook("init_secrets.yml", "ansible/init_secrets.yml", inventories=[fresh], password_file=nothing)
    stack.know(*Vault(fresh).secrets("of another inventory"))
    stack.vault.plant()
    stack.playbook("check mode on a bare host", "site.yml", "--check")
    stack.playbook("site.yml", "site.yml")
    stack.learn("first")


def work(stack: Stack) -> None:
    """A day without trouble, and clients who err."""
    days = "".join(f"2026-10-{day:02d},10,14,9,{10 + day / 10},{10 + day / 10},1000\n" for day in range(1, 31))
    stack.on_host("cat > /var/lib/larder/incoming/AAPL.csv", "Date,Open,High,Low,Close,Adj Close,Volume\n" + days)
    stack.on_host("systemctl start feature-pipeline.service")
    stack.say("status", "larder status")
    stack.say("status at debug level", "larder --debug status")
    stack.say("feast", "feast feature-views list")
    stack.say("no credential", "larder --credentials /nonexistent status")
    stack.wait_until_it_serves()
    reader, writer = stack.tokens["reader"], stack.tokens["writer"]
    former = canary(AWKWARD_TOKEN)
    stack.know(Secret("a token that nobody has", "token", former))
    stack.read("a token that nobody has", former)
    stack.read("a token and more", f"{reader}x")
    stack.read("an unknown view", feature="nonsense:close")
    stack.read("an unknown feature", feature="ohlcv_features:nonsense")
    stack.ask("no token", "/get-online-features", None, {})
    stack.ask("a reader pushes", "/push", reader, {})
    stack.ask("a push of nothing", "/push", writer, {})
    stack.ask("a push of nonsense", "/push", writer, {"push_source_name": "nonsense", "df": {"x": [1]}})
    stack.ask("no JSON", "/get-online-features", reader, b"{")
    stack.ask("a path that clients may not ask", "/docs", reader)
    stack.ask("a token in the query", f"/get-online-features?token={quote(reader, safe='')}", None, {})
    stack.ask("much too large", "/get-online-features", reader, b" " * 5_000_000)
    stack.ask("health", "/health", reader)
    stack.ask("ready", "/ready", reader)


def lose_stores(stack: Stack) -> None:
    """Each store is away for a while, and clients and operators meet that."""
    for unit in ("redis-server", "postgresql@17-main"):
        stack.on_host(f"systemctl stop {unit}")
        stack.read(f"read without {unit}")
        stack.ask(f"push without {unit}", "/push", stack.tokens["writer"], a_push())
        stack.ask(f"ready without {unit}", "/ready", stack.tokens["reader"])
        stack.say(f"status without {unit}", "larder --debug status")
        stack.say(f"pipeline without {unit}", "systemctl start feature-pipeline.service")
        stack.on_host(f"systemctl start {unit}")
    stack.wait_until_it_serves()


def crash(stack: Stack) -> dict[str, tuple[str, str]]:
    """End every service by a signal that dumps core; return its process before and after."""

    def processes() -> list[str]:
        return [stack.on_host(f"systemctl show --property=MainPID --value {unit}").strip() for unit in UNITS]

    before = processes()
    stack.on_host("systemctl start --no-block feature-pipeline.service; sleep 2")
    for unit in (*UNITS, "feature-pipeline"):
        stack.say(f"crash of {unit}", f"systemctl kill --signal=SEGV {unit}")
    time.sleep(2)
    for unit in UNITS:
        stack.on_host(f"timeout 60 sh -c 'until systemctl is-active --quiet {unit}; do sleep 1; done'")
    stack.wait_until_it_serves()
    return dict(zip(UNITS, zip(before, processes(), strict=True), strict=True))


def core_files(stack: Stack) -> list[str]:
    # Nothing there is the good case.
    caught = "ls -d /var/lib/systemd/coredump/* 2> /dev/null || true"
    return stack.on_host(f"python3 - {stack.started:.0f}; {caught}", FIND_CORES).split()


def refuse(stack: Stack) -> None:
    """Runs that end before a host is touched."""
    wrong = stack.work / "wrong_password"
    wrong.write_text(canary())
    stack.know(Secret("a wrong password of the vault", "password", wrong.read_text()))
    stack.playbook("a wrong password of the vault", "site.yml", password_file=wrong)

    faulty = {
        "too short": alphanumeric(15),
        "two lines": f"{alphanumeric()}\n{alphanumeric()}",
        "a template": f"{alphanumeric()}{{{{ n{alphanumeric()} }}}}{alphanumeric()}",
        "half a template": f"{alphanumeric()}{{{{{alphanumeric()}",
        "in a list": canary(),
        "in a dictionary": canary(),
        "no dictionary": canary(),
        "a third token": canary(AWKWARD_TOKEN),
        "a token with a space": f"{alphanumeric()} {alphanumeric()}",
    }
    stack.know(*(Secret(f"a faulty secret: {name}", "password", value) for name, value in faulty.items()))
    redis = {
        "serve": faulty["too short"],
        "push": faulty["two lines"],
        "materialize": faulty["a template"],
        "monitor": [faulty["in a list"]],
        "admin": {"password": faulty["in a dictionary"]},
    }
    tokens = {
        "reader": [canary(AWKWARD_TOKEN), canary(AWKWARD_TOKEN), faulty["a third token"]],
        "writer": faulty["a token with a space"],
    }
    secrets = {"redis_passwords": redis, "timescaledb_passwords": faulty["no dictionary"], "gateway_tokens": tokens}
    stack.playbook("secrets that cannot work", "site.yml", variables=secrets)
    half = {"redis_passwords": {**stack.vault.read()["redis_passwords"], "serve": faulty["half a template"]}}
    stack.playbook("a secret that is half a template", "site.yml", variables=half)

    word = alphanumeric(30)
    stack.know(Secret("a secret beside a slip of the pen", "password", word))
    inventory = stack.work / "slip"
    (inventory / "group_vars/all").mkdir(parents=True)
    (inventory / "hosts.yml").write_text((SCENARIO / "inventory/hosts.yml").read_text())
    (inventory / ".vault_password").write_text(stack.vault.password)
    vault = Vault(inventory)
    vault.write_text(f"redis_passwords:\n  serve: '{word}\n  push: {word}: x\n")
    password = inventory / ".vault_password"
    stack.playbook("a vault that is no YAML", "site.yml", inventories=[inventory], password_file=password)


def rotate(stack: Stack) -> None:
    """New secrets, and a second authority; two rotations that fail on their way, and one that ends."""
    stack.playbook("new_secrets.yml", "ansible/new_secrets.yml")
    stack.playbook("a second authority", "ansible/new_secrets.yml", variables={"secrets": "certificate_authorities"})
    stack.know(*stack.vault.secrets("second"))
    stack.on_host("systemctl mask --runtime --now postgresql@17-main")
    stack.playbook("a rotation without PostgreSQL", "ansible/rotate_secrets.yml")
    stack.on_host("systemctl unmask --runtime postgresql@17-main && systemctl start postgresql@17-main")
    stack.on_host(
        "nft add table inet leaks && nft 'add chain inet leaks in { type filter hook input priority -10; }'"
        " && nft add rule inet leaks in tcp dport 6379 reject with tcp reset"
    )
    stack.playbook("a rotation that no consumer can try", "ansible/rotate_secrets.yml")
    stack.on_host("nft delete table inet leaks")
    stack.playbook("rotate_secrets.yml", "ansible/rotate_secrets.yml")
    stack.learn("second")
    path = stack.work / "client/feature_store.yaml"
    path.parent.mkdir()
    stack.playbook("client_config.yml", "ansible/client_config.yml", f"--extra-vars=client_path={path}")
    stack.wait_until_it_serves()
    stack.say("status after the rotation", "larder status")
    # As late as this: HAProxy forgets it when it restarts.
    stack.ask_wrongly("no HTTP", stack.tokens["reader"])


def live(stack: Stack) -> dict[str, tuple[str, str]]:
    """All of it, in this order; return what crash does."""
    deploy(stack)
    with stack.monitored():
        work(stack)
    lose_stores(stack)
    crashed = crash(stack)
    refuse(stack)
    rotate(stack)
    return crashed
