"""Serve a page about a saved selection, and optionally tools over MCP, with Gradio.

The page loads nothing from elsewhere, sends nothing elsewhere, and shows texts of the data as texts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

from ..core.configs import AppConfig
from ..core.errors import NeuronSelectError
from ..core.text import shown
from .parts import Say, quiet

LOCAL = ("127.0.0.1", "localhost", "::1")


def check_gradio(config: AppConfig) -> None:
    """Refuse to start without Gradio.

    Raises:
        NeuronSelectError: it is missing, or what its MCP server needs is.
    """
    needed = {"gradio": "Gradio", **({"mcp": "the package mcp"} if config.mcp else {})}
    for package, name in needed.items():
        if importlib.util.find_spec(package) is None:
            raise NeuronSelectError(f"app needs {name}: pip install 'hf-neuronselect[app]'")


def serve(config: AppConfig, *, say: Say = quiet, note: Say = quiet, wait: Callable[[], Any] | None = None) -> None:
    """Serve until it is interrupted.

    Args:
        wait: called while it is served; default forever.

    Raises:
        NeuronSelectError: no such selection, no Gradio, or the port is taken.
    """
    check_gradio(config)
    port = config.port or _free_port(config.host)
    page, url = _started(config, port)
    try:
        say(f"{shown(config.folder)}: {url} (Ctrl-C ends it)")
        if config.mcp:
            say(f"MCP (streamable HTTP): {url.rstrip('/')}/gradio_api/mcp/")
        if config.host not in LOCAL:
            note(f"warning: whoever reaches {config.host}:{port} can read the rows; there is no password")
        (wait or threading.Event().wait)()
    finally:
        with contextlib.redirect_stdout(io.StringIO()):
            page.close(verbose=False)


def _started(config: AppConfig, port: int) -> tuple[Any, str]:
    """The page, served, and its address."""
    # Gradio reads these when it is imported.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    from .app_page import CSS, page_of, theme
    from .browse import Browser

    page = page_of(Browser(config))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Gradio greets
            _, url, _ = page.launch(
                server_name=config.host, server_port=port, share=False, inbrowser=False, quiet=True, show_error=True,
                prevent_thread_lock=True, mcp_server=config.mcp, ssr_mode=False, pwa=False, footer_links=[],
                enable_monitoring=False, app_kwargs=_guards(config), theme=theme(), css=CSS,
            )  # fmt: skip
    except OSError as cause:
        raise NeuronSelectError("cannot be listened at: it is taken, or not allowed; 0 finds a free one", option="port",
                                value=port) from cause  # fmt: skip
    return page, url


def _guards(config: AppConfig) -> dict[str, Any]:
    """On this machine alone, requests by another name are refused: a page elsewhere may let its name point here."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    if config.host not in LOCAL:
        return {}
    return {"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])]}


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        try:
            one.bind((host, 0))
        except OSError as cause:
            raise NeuronSelectError(
                f"is no address of this machine ({cause.strerror}); 127.0.0.1 always is", option="host", value=host
            ) from cause
        return int(one.getsockname()[1])
