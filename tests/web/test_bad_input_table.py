"""All bad input at once, as `make bad-input` sends it: to the service itself, and to one behind nginx."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from proxying import NGINX_VERSION, nginx, nginx_version
from serving import ADMIN_PASSWORD, PATIENCE_SECONDS, Serving

SCRIPT = Path(__file__).resolve().parents[1] / "bad_input.py"
#: For how long nginx listens to what it has refused; its own default would make this test wait.
QUICK = "lingering_timeout 200ms; "
UPSTREAM = """
    upstream orders {{ server {address}; keepalive 16; }}
    proxy_http_version 1.1;
    proxy_set_header Connection "";
"""


def sent_to(*arguments: str) -> subprocess.Popen[str]:
    # Rows that take ten seconds are in test_limits.py.
    command = [sys.executable, str(SCRIPT), *arguments, "--without-slow", "--password", ADMIN_PASSWORD]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def differences(script: subprocess.Popen[str]) -> list[str]:
    """Return the rows that were answered otherwise than expected, once it has ended."""
    table, _ = script.communicate(timeout=PATIENCE_SECONDS)
    rows = table.splitlines()
    assert len(rows) > 400, table
    found = [row for row in rows if row.endswith("DIFFERS")]
    assert script.returncode == (1 if found else 0)
    return found


def test_all_bad_input_is_answered_as_the_table_says(idle_service: Serving) -> None:
    """Each of some 450 inputs has its status, its problem document and its pointer, and leaves the rest alone."""
    assert differences(sent_to(idle_service.url)) == []
    assert idle_service.client.get("/health").status_code == 200
    assert [line for line in idle_service.log if "Traceback" in line or "a request failed" in line] == []


def test_behind_nginx_it_is_the_same_but_for_what_nginx_answers(idle_service: Serving, tmp_path: Path) -> None:
    """What nginx lets through is answered alike; what it answers itself is marked in the table."""
    if nginx_version() != NGINX_VERSION:
        pytest.skip(f"the table is of nginx {NGINX_VERSION}, and this is {nginx_version()}")
    upstream = UPSTREAM.format(address=idle_service.url.removeprefix("http://"))
    with nginx(tmp_path, QUICK + "location / { proxy_pass http://orders; }", upstream) as url:
        assert differences(sent_to(url, "--behind-nginx")) == []


def test_a_difference_is_shown_and_told(tmp_path: Path) -> None:
    """Something else at the address, here an nginx that says yes to everything, fails the script."""
    with nginx(tmp_path, QUICK + 'location / { return 200 "{\\"order_id\\": \\"a\\"}"; }') as url:
        assert len(differences(sent_to(url))) > 400
