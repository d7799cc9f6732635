"""A real MLflow server on loopback, in a thread, that can be stopped, hang, refuse, or lose an answer."""

import io
import json
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from werkzeug.serving import BaseWSGIServer, make_server

LOG_BATCH = "/runs/log-batch"
CREATE_RUN = "/runs/create"


class MlflowServer:
    """Serves MLflow at one port whenever it is up.

    stored: how often the server stored each metric of a step, by (run id, name, step). `ails` is how it ails:
    "" not at all, "loses" does what a request asks and drops its answer, "refuses" answers 503, "hangs" answers
    nothing until `cure` is called. It ails only at addresses that end in `at`.
    """

    def __init__(self) -> None:
        # Held as long as this lives: else, while the server is down, the system may give its port to someone else,
        # or to a connection that looks for the server, which then reaches itself.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", 0))
        self.port = int(self._reserved.getsockname()[1])
        self.stored: Counter[tuple[str, str, int]] = Counter()
        self.requests = 0
        self.ails, self.at = "", ""
        self._cured = threading.Event()
        self._server: BaseWSGIServer | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        if self._server is None:
            logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
            self._server = self._listening()
            threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def _listening(self) -> BaseWSGIServer:
        """A server at the port, which what the last one has left may hold for a moment yet, on a busy machine."""
        give_up_at = time.monotonic() + 60
        while True:
            try:
                return make_server("127.0.0.1", self.port, self._answer, threaded=True)
            except SystemExit:  # of werkzeug, which takes itself for a command
                if time.monotonic() > give_up_at:
                    raise OSError(f"port {self.port} stays taken") from None
                time.sleep(0.1)

    def stop(self) -> None:
        self.cure()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def fall_ill(self, ails: str, at: str = "") -> None:
        self._cured.clear()
        self.ails, self.at = ails, at

    def cure(self) -> None:
        self.ails = ""
        self._cured.set()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        from mlflow.server import app

        self.requests += 1
        ails = self.ails if environ["PATH_INFO"].endswith(self.at) else ""
        if ails == "hangs":
            self._cured.wait(30)
        if ails == "refuses":
            start_response("503 SERVICE UNAVAILABLE", [("Content-Length", "0")])
            return []
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        statuses: list[str] = []

        def keep_status(status: str, headers: list[tuple[str, str]], *rest: Any) -> None:
            statuses.append(status)
            if ails != "loses":
                start_response(status, headers, *rest)

        answer = b"".join(app(environ, keep_status))
        if environ["PATH_INFO"].endswith(LOG_BATCH) and statuses[0].startswith("200"):
            batch = json.loads(body)
            self.stored.update((batch["run_id"], m["key"], int(m["step"])) for m in batch.get("metrics", ()))
        if ails == "loses":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError("the answer is lost")
        return [answer]
