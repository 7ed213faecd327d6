"""The feature server: Feast's own application, with a readiness check that asks what a client asks.

gunicorn calls `create_app` in each worker after the fork (see gunicorn.py). It adds to Feast's application:

- Features are read from a plan made once per feature list, and with their age if the client asks (see online).

- `GET /ready` reads one feature through the endpoint that clients use. `status` is `ready` (200), `draining` (404,
  which HAProxy takes as "send nothing new") or, with 503, `no registry` (not reached yet, or nothing was ever applied),
  `no feature view` or `no online store`. `revision` names what the instance was started with, `unaware` the gateways
  that do not know of this status yet (see drain). The gateways ask the same on a port of their own, and are
  answered however busy this worker is (see checks). Prometheus asks there, too (see metrics).
- The registry is read again every `cache_ttl_seconds`, in the background; while it is away or empty, the last one is
  served. Where views are gone, they may be about to be applied again, to a database that was lost: it is read again
  soon. (Feast's own timer ends for ever with the first refresh that fails.)
- A sample of what clients are answered is kept, and told at a port of its own to the pipeline's host (see served).
- Pushes are judged before they are written (see push), reads that Feast cannot answer are explained (see
  explain), and every error has one shape and says whose it is (see failures).
"""

import asyncio
import gc
import logging
import os
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from feast import FeatureStore, ValueType
from feast.feature_server import get_app
from feast.infra.online_stores.redis import RedisOnlineStore
from feast.permissions.server.utils import (
    ServerType,
    init_auth_manager,
    init_security_manager,
    str_to_auth_manager_type,
)
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry
from starlette.applications import Starlette
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from larder.serving import drain, explain, metrics, push
from larder.serving.checks import Checks, Server
from larder.serving.failures import HANDLERS, OneShape, failed, say_nothing
from larder.serving.online import Online
from larder.serving.served import Served

log = logging.getLogger("uvicorn.error")

# Less than HAProxy's `timeout check`.
READY_SECONDS = 3.0
# Between two reads of a registry that lacks something.
SOON_SECONDS = 2.0
# How long a thread may keep the interpreter from the event loop: Python's default is ten times as long.
SWITCH_SECONDS = 0.0005
# An entity that nobody has, by the type of its key.
NOBODY = {
    ValueType.STRING: "larder-ready",
    ValueType.INT32: -1,
    ValueType.INT64: -1,
    ValueType.FLOAT: -1.0,
    ValueType.DOUBLE: -1.0,
    ValueType.BOOL: False,
}


class FeatureServer(Starlette):
    """One worker: Feast's application, once there is a registry to build it from, and what is known about its store."""

    def __init__(self, store: FeatureStore) -> None:
        routes = [Route("/ready", self.ready), Mount("/", self.serve)]
        super().__init__(routes=routes, exception_handlers=HANDLERS, lifespan=self.lifespan)
        self.store = store
        # Feast would refresh an old cache within a client's request; this server refreshes beside them.
        self.registry_ttl = store.config.registry.cache_ttl_seconds or 60
        store.config.registry.cache_ttl_seconds = 0
        self.gateways = drain.Gateways(drain.directory(), drain.listed())
        self.draining = drain.directory() / drain.DRAINING
        self.revision = os.environ.get("LARDER_REVISION", "")
        self.feast: FastAPI | None = None
        self.online: Online | None = None
        self.fast: ServerErrorMiddleware | None = None
        self.canary: dict[str, Any] | None = None
        self.views: set[str] = set()
        self.complete = False
        self.served = Served.configured()
        auth = str_to_auth_manager_type(store.config.auth_config.type)
        init_security_manager(auth_type=auth, fs=store)
        init_auth_manager(auth_type=auth, server_type=ServerType.REST, auth_config=store.config.auth_config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
        elif self.fast and Online.answers(scope):
            # Past all that Starlette and FastAPI do for other requests.
            await metrics.counted(self.fast, scope, receive, send)
        else:
            await metrics.counted(super().__call__, scope, receive, send)

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self.feast or JSONResponse({"detail": "no registry"}, 503))(scope, receive, send)

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await self.refresh(stack)
            keep_fresh = asyncio.create_task(self.keep_fresh(stack))
            shared = metrics.Shared(Path(os.environ["LARDER_METRICS"])) if "LARDER_METRICS" in os.environ else None
            if shared:
                stack.callback(asyncio.create_task(shared.keep()).cancel)
            if "LARDER_CHECK_PORT" in os.environ:
                checks = Checks(*listener("LARDER_CHECK_PORT"), self.check, partial(metrics.exposition, shared))
                stack.callback(checks.close)
                stack.callback(asyncio.create_task(checks.beat()).cancel)
            if self.served:
                stack.callback(Server(*listener("LARDER_SAMPLE_PORT"), {"/served": self.served.told}).close)
                stack.callback(asyncio.create_task(self.served.keep()).cancel)
            notify_systemd()
            try:
                yield
            finally:
                keep_fresh.cancel()
                if self.online:
                    self.online.close()

    @property
    def pause(self) -> float:
        """Seconds until the registry is read again."""
        return self.registry_ttl if self.complete else min(SOON_SECONDS, self.registry_ttl)

    async def keep_fresh(self, stack: AsyncExitStack) -> None:
        while True:
            await asyncio.sleep(self.pause)
            await self.refresh(stack)

    async def refresh(self, stack: AsyncExitStack) -> None:
        """Read the registry; start Feast's application with it if that has not been done."""
        try:
            if self.feast is None:
                app = await run_in_threadpool(build, self.store)
                await stack.enter_async_context(app.router.lifespan_context(app))
                await fail_fast(self.store)
                self.online = Online(self.store, app, failed, self.served)
                self.fast = ServerErrorMiddleware(self.online, say_nothing)
                self.feast = app
                # What is here stays: looking through it again and again would hold up a request each time.
                gc.freeze()
            else:
                # Feast's refresh hides its errors: a read before it tells them.
                views = await run_in_threadpool(self.store.list_feature_views)
                if self.views and not views:
                    log.warning("The registry has no feature view any more: serving the former ones, reading it again.")
                    self.complete = False
                    return
                await run_in_threadpool(self.store.refresh_registry)
                assert self.online
                await run_in_threadpool(self.online.refresh)
            self.canary = await run_in_threadpool(find_canary, self.store)
            views = {view.name for view in self.store.list_feature_views(allow_cache=True)}
            self.complete = bool(views) and views >= self.views
            self.views = views
        except Exception as error:  # whatever it is, what is here goes on serving
            log.warning("The registry cannot be read (%s); trying again.", type(error).__name__)

    async def ready(self, request: Request) -> JSONResponse:
        status_code, status = await self.readiness()
        return JSONResponse(self.told(status, request.client.host if request.client else ""), status_code)

    def check(self, client: str) -> tuple[int, dict[str, Any]]:
        """Return what a gateway is told; runs in a thread, and reads over a connection of that thread's own."""
        status_code, status = self.known()
        if status == drain.READY and self.canary:
            try:
                self.store.get_online_features(self.canary["features"], self.canary["entities"])
            except Exception as error:  # whatever it is, clients' reads fail of it too
                log.warning("The health check cannot read a feature (%s).", type(error).__name__)
                status_code, status = 503, "no online store"
        return status_code, self.told(status, client)

    def told(self, status: str, client: str) -> dict[str, Any]:
        """Return the answer to a client, and note that it was given."""
        answer: dict[str, Any] = {"status": status, "revision": self.revision}
        if status != drain.READY:
            answer["detail"] = status
        if status in drain.TIMES:
            self.gateways.note(client, status)
            answer["unaware"] = self.gateways.unaware(status)
        return answer

    def known(self) -> tuple[int, str]:
        """Return what is known without a read."""
        if self.draining.exists():
            return 404, drain.DRAINING
        if self.online is None:
            return 503, "no registry"
        if self.canary is None:
            return 503, "no feature view"
        return 200, drain.READY

    async def readiness(self) -> tuple[int, str]:
        status_code, status = self.known()
        if self.online and self.canary and status == drain.READY:
            try:
                await asyncio.wait_for(self.online.probe(self.canary), READY_SECONDS)
            except Exception as error:  # whatever it is, clients' reads fail of it too
                log.warning("The readiness check cannot read a feature (%s).", type(error).__name__)
                return 503, "no online store"
        return status_code, status


def build(store: FeatureStore) -> FastAPI:
    """Return Feast's application with pushes that are judged, and errors that tell the client's from the server's."""
    app: FastAPI = get_app(store, registry_ttl_sec=0)
    app.add_middleware(OneShape)
    for error, handler in HANDLERS.items():
        app.add_exception_handler(error, handler)
    push.add_to(app, store)
    explain.add_to(app, store)
    return app


async def fail_fast(store: FeatureStore) -> None:
    """Let Redis clients retry once, at once: a dropped connection is replaced, a Redis that is down is an error now.

    redis-py's default, three retries with growing pauses, holds a client's request for seconds; HAProxy retries anyway.
    """
    online = store._get_provider().online_store  # Feast's configuration cannot carry a retry policy
    if isinstance(online, RedisOnlineStore):
        dropped = (RedisConnectionError,)
        online._get_client(store.config.online_store).set_retry(Retry(NoBackoff(), 1, dropped))
        (await online._get_client_async(store.config.online_store)).set_retry(AsyncRetry(NoBackoff(), 1, dropped))


def find_canary(store: FeatureStore) -> dict[str, Any] | None:
    """Return the body of a request for one feature of the first view, by name, whose entities can be made up."""
    for view in sorted(store.list_feature_views(allow_cache=True), key=lambda view: view.name):
        keys = [(column.name, column.dtype.to_value_type()) for column in view.entity_columns]
        if view.online and view.features and all(value_type in NOBODY for _, value_type in keys):
            return {
                "entities": {name: [NOBODY[value_type]] for name, value_type in keys},
                "features": [f"{view.name}:{view.features[0].name}"],
            }
    return None


def listener(port_of_first: str) -> tuple[tuple[str, int], ssl.SSLContext]:
    """Return where checks, or questions for the sample, come in, and the TLS that they speak: that of the clients."""
    port = int(os.environ[port_of_first]) + int(os.environ["LARDER_INSTANCE"]) - 1
    own = Path(os.environ["LARDER_CERTIFICATE"])
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(own / "ca.crt"))
    tls.minimum_version = ssl.TLSVersion.TLSv1_3
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.load_cert_chain(own / "tls.crt", own / "tls.key")
    return (os.environ["LARDER_ADDRESS"], port), tls


def notify_systemd() -> None:
    """Tell systemd that this instance serves; nothing where systemd does not ask."""
    address = os.environ.get("LARDER_NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"READY=1", address.replace("@", "\0", 1))


def open_store() -> FeatureStore:
    """Return Feast's store by this process's credentials."""
    try:
        return FeatureStore(fs_yaml_file=Path(os.environ["CREDENTIALS_DIRECTORY"]) / "feature_store.yaml")
    except Exception as error:  # Feast's messages quote the file, passwords included
        raise SystemExit(f"feature_store.yaml cannot be used: {type(error).__name__}") from None


def create_app() -> Starlette:
    """Build the application from this process's credentials."""
    store = open_store()
    sys.setswitchinterval(SWITCH_SECONDS)
    return FeatureServer(store)
