"""Feast's own web interface, which shows what the registry holds, to whom the gateways let in.

Feast has no login for it, and its API deletes a feature view for whoever asks. Here it hears hosts of the stack alone,
answers nothing that is not a question, and its login at PostgreSQL can read the registry and nothing else.
"""

from feast.ui_server import get_app
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from larder.serving.application import notify_systemd, open_store

QUESTIONS = ("GET", "HEAD")
# Feast reads a saved dataset from the offline store for this, which the login may not.
DATA = "/api/v1/saved_datasets/data/"


class ReadOnly:
    """An application that hears nothing but questions about the registry: 405 for another method, 404 for data."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: ASGIApp = self.app
        if scope["type"] == "http" and scope["method"] not in QUESTIONS:
            answer = JSONResponse({"detail": "this interface changes nothing"}, 405, {"Allow": ", ".join(QUESTIONS)})
        elif scope["type"] == "http" and scope["path"].startswith(DATA):
            answer = JSONResponse({"detail": "this interface shows no data"}, 404)
        await answer(scope, receive, send)


def create_app() -> ASGIApp:
    """Build the application from this process's credentials."""
    store = open_store()
    app = ReadOnly(get_app(store, store.project))
    notify_systemd()
    return app
