"""A page of another origin, in a real browser: it places, lists, changes and deletes orders by fetch."""

from __future__ import annotations

import html
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from browsing import a_tab, drawn_by_chromium
from servers import RedisServer
from serving import Serving

PAGE = """<!doctype html><title>Orders</title><body>waiting</body><script>
const said = [];
async function call(method, path, body) {
  const headers = body ? {"Content-Type": "application/json", "Idempotency-Key": method + path} : {};
  const answer = await fetch("%s" + path, {method, headers, body: body && JSON.stringify(body)});
  const text = await answer.text();
  const document = text ? JSON.parse(text) : {};
  said.push([method, answer.status, document.status || document.message || document.error || document.count]);
  return document;
}
async function until(path, shown) {
  for (let tries = 0; tries < 8000; tries++) {  // the browser's time passes only while nothing is asked for
    const answer = await fetch("%s" + path);
    if (answer.status === shown || (await answer.json()).status === shown) return said.push(["shown", shown]);
    await new Promise(done => setTimeout(done, 5));
  }
}
(async () => {
  try {
    const order = await call("POST", "/orders", {customer_name: "Alice", items: [{name: "Pen", quantity: "2"}]});
    const path = "/orders/" + order.order_id;
    await call("PATCH", path + "/status", {status: "preparing"});
    await until(path, "processing");
    await call("GET", "/orders");
    await call("POST", "/orders", {});
    await call("DELETE", path);
    await until(path, 404);
  } catch (error) {
    said.push(["error", String(error)]);
  }
  document.body.textContent = JSON.stringify(said);
})();
</script>"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Nobody reads what a page was asked for."""


@contextmanager
def other_origin(folder: Path, page: str) -> Iterator[str]:
    """Serve a page on a port of its own; yield its address."""
    (folder / "page.html").write_text(page)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/page.html"
        finally:
            server.shutdown()
            thread.join()


def said_by(page: str) -> Any:
    """Return what the script of PAGE has left in its body."""
    found = re.search(r"<body[^>]*>(.*?)</body>", page, re.S)
    assert found is not None, page
    return json.loads(html.unescape(found[1]))


@pytest.fixture(params=["cached", "queued"])
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Serving]:
    """A service that lets every origin in, as the clients of these two know it."""
    settings = {}
    if request.param == "queued":
        redis: RedisServer = request.getfixturevalue("redis_server")
        settings["BROKER_URL"] = settings["REDIS_URL"] = redis.new_database()
    with Serving(tmp_path, COMPAT=request.param, **settings) as running:
        yield running


def test_a_page_of_another_origin_works_with_orders(service: Serving, tmp_path: Path) -> None:
    """It places one, changes its status, lists, is told what is wrong, deletes, and sees each happen."""
    folder = tmp_path / "site"
    folder.mkdir()
    with other_origin(folder, PAGE % (service.url, service.url)) as address:
        said = said_by(drawn_by_chromium(tmp_path, address))
    created, changed, shown, listed, refused, deleted, gone = said
    assert created[0::2] == ["POST", "received"]
    assert created[1] in (201, 202)
    assert changed[:2] in (["PATCH", 200], ["PATCH", 202])
    assert (shown, gone) == (["shown", "processing"], ["shown", 404])
    assert listed[:2] == ["GET", 200]
    assert refused[:2] == ["POST", 400]
    assert deleted[:2] in (["DELETE", 200], ["DELETE", 202])


def test_a_page_is_kept_out_where_nobody_let_it_in(tmp_path: Path) -> None:
    """Without CORS_ORIGINS the browser gives it no answer, and no change gets through."""
    folder = tmp_path / "site"
    folder.mkdir()
    with Serving(tmp_path) as closed, other_origin(folder, PAGE % (closed.url, closed.url)) as address:
        ((what, reason),) = said_by(drawn_by_chromium(tmp_path, address))
        assert what == "error"
        assert "Failed to fetch" in reason
        assert closed.client.get("/orders").json()["total"] == 0


@pytest.mark.parametrize(
    ("path", "title"), [("/docs", "Expediter: try the API"), ("/redoc", "Expediter: the API")]
)
def test_the_pages_of_the_interface_draw(tmp_path: Path, path: str, title: str) -> None:
    """They draw the whole interface from this service alone, and are sent packed, and once."""
    with Serving(tmp_path, "--no-workers") as service:
        page = service.client.get(path)
        assert page.headers["content-encoding"] == "gzip"
        assert int(page.headers["content-length"]) < 700_000
        assert f"<title>{title}</title>" in page.text
        assert "default-src 'none'; script-src 'sha256-" in page.headers["content-security-policy"]
        plain = service.client.get(path, headers={"accept-encoding": "identity"})
        assert "content-encoding" not in plain.headers
        assert plain.text == page.text
        again = service.client.get(path, headers={"if-none-match": page.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        drawn = drawn_by_chromium(tmp_path, f"{service.url}{path}")
        assert "Place orders, read them, and change them." in drawn  # from /openapi.json


CLICKS = """(async () => {
  async function until(find) {
    for (let tries = 0; tries < 5000; tries++) {
      const found = find();
      if (found) return found;
      await new Promise(done => setTimeout(done, 20));
    }
    throw new Error("it never came: " + find);
  }
  const call = await until(() => document.getElementById("operations-%s"));
  (await until(() => call.querySelector(".opblock-summary-control"))).click();
  (await until(() => call.querySelector(".execute"))).click();
  const answer = await until(() => call.querySelector(".live-responses-table tbody .response-col_status"));
  return answer.textContent.trim();
})()"""


@pytest.mark.parametrize(
    ("operation", "status"),
    [("orders-createOrder", "202"), ("orders-listOrders", "200"), ("service-health", "200")],
)
async def test_try_it_out_works_at_the_first_click(tmp_path: Path, operation: str, status: str) -> None:
    """On /docs a call is opened, and sent as its example stands there; the answer is a good one."""
    with Serving(tmp_path) as running:
        async with a_tab(tmp_path, f"{running.url}/docs") as run:
            assert await run(CLICKS % operation) == status
