"""A W&B server on the loopback interface, for the real client: what it is told it keeps, and gives back.

It speaks the part of the protocol that logging, syncing and reading runs need: the GraphQL operations below, the
file stream, and files by PUT and GET. An operation that it does not know is an error for the client and is
remembered in `unknown`, so that a test can fail on it. It shows how the client behaves, not how W&B's server does.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

ENTITY = "lab"
KEY = "7261" * 10
_LAST_PAGE = {"endCursor": None, "hasNextPage": False}

# What these operations are answered, whatever they ask.
_FIXED: dict[str, Any] = {
    "ArtifactType": {"project": {"artifact": None}},
    "ServerFeaturesQuery": {"serverInfo": {"features": []}},
    "ServerInfo": {"serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None}},
    "RunStoppedStatus": {"project": {"run": {"stopped": False}}},
    "OrganizationCoreWeaveOrganizationID": {"entity": {"organization": {"coreWeaveOrganizationId": None}}},
    "GetDefaultEntity": {"viewer": {"id": "1", "entity": ENTITY}},
    "Viewer": {
        "viewer": {"id": "1", "entity": ENTITY, "username": "person", "email": "person@example.org", "flags": "{}"}
        | {"teams": {"edges": []}}
    },
}
# What every run is said to be.
_NODE = {
    **{"tags": [], "notes": None, "description": "", "sweepName": None, "commit": None, "readOnly": False},
    **{"createdAt": "2026-01-01T00:00:00Z", "heartbeatAt": "2026-01-01T00:00:01Z"},
}
_FILE = {"mimetype": "application/octet-stream", "updatedAt": "2026-01-01T00:00:00Z", "md5": ""}

Variables = dict[str, Any]


@dataclass
class StoredRun:
    """What the server knows of a run."""

    name: str
    project: str
    config: str = "{}"
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    state: str = "running"
    group: str | None = None
    job_type: str | None = None


class LoopbackWandb:
    """The server, from the beginning of a context to its end.

    Attributes:
        runs: by name.
        files: by path of their URL.
        operations: names of the GraphQL operations that were asked for, in order.
        unknown: those that it has no answer to.
        authorized: whether every request that needs one came with the key.
    """

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.files: dict[str, bytes] = {}
        self.operations: list[str] = []
        self.unknown: list[str] = []
        self.authorized = True
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackWandb:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, operation: str, variables: Variables, query: str) -> dict[str, Any]:
        """The data of a GraphQL operation, or errors."""
        self.operations.append(operation)
        if operation in _FIXED:
            return {"data": _FIXED[operation]}
        method = getattr(self, f"_do_{operation}", None)
        if method is None:
            self.unknown.append(f"{operation}: {' '.join(query.split())[:400]}")
            return {"errors": [{"message": f"unknown operation {operation}"}]}
        return {"data": method(variables, query)}

    def stream(self, name: str, content: dict[str, Any]) -> None:
        """History, summary and state of a run, as they come."""
        run = self.runs[name]
        for file, chunk in (content.get("files") or {}).items():
            lines = [json.loads(line) for line in chunk["content"]] if file.endswith((".jsonl", ".json")) else []
            if file == "wandb-history.jsonl":
                run.history[chunk["offset"] :] = lines
            elif file == "wandb-summary.json":
                run.summary = lines[-1]
        if content.get("complete"):
            run.state = "failed" if content.get("exitcode") else "finished"

    # -- writing ----------------------------------------------------------------------------------------------------

    def _do_UpsertBucket(self, variables: Variables, query: str) -> Any:
        name = variables.get("name") or variables["id"]
        new = name not in self.runs
        run = self.runs.setdefault(name, StoredRun(name, variables.get("project") or ""))
        for key, told in (("config", "config"), ("group", "groupName"), ("job_type", "jobType")):
            if variables.get(told) is not None:
                setattr(run, key, variables[told])
        return {"upsertBucket": {"inserted": new, "bucket": self._node(run)}}

    def _do_RunResumeStatus(self, variables: Variables, query: str) -> Any:
        run = self.runs.get(variables["name"])
        bucket = run and self._node(run) | {
            **{"logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]", "wandbConfig": json.dumps({"t": 1})},
            "historyTail": json.dumps([json.dumps(item) for item in run.history[-1:]]),
        }
        return {"model": self._project(variables["project"]) | {"bucket": bucket}}

    def _do_CreateRunFiles(self, variables: Variables, query: str) -> Any:
        run = variables["run"]
        files = [{"name": name, "uploadUrl": f"{self.url}/storage/{run}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}

    def _do_CreateArtifact(self, variables: Variables, query: str) -> Any:
        # Tables are logged as artifacts too. This one says that it has the content, so that none is sent.
        digest = variables["input"]["digest"]
        sequence = {"latestArtifact": {"id": digest}}
        return {"createArtifact": {"artifact": {"id": digest, "state": "COMMITTED", "artifactSequence": sequence}}}

    # -- reading ----------------------------------------------------------------------------------------------------

    def _do_Runs(self, variables: Variables, query: str) -> Any:
        found = [run for run in self.runs.values() if run.project == variables["project"]]
        if not found:
            return {"project": None}  # W&B makes a project with its first run
        edges = [{"node": self._node(run, query), "cursor": run.name} for run in found]
        runs = {"edges": edges, "pageInfo": _LAST_PAGE}
        return {"project": {"internalId": "7", "runCount": len(found), "readOnly": False, "runs": runs}}

    def _do_Run(self, variables: Variables, query: str) -> Any:
        run = self.runs.get(variables["name"])
        return {"project": {"run": run and self._node(run, query)}}

    def _do_RunFiles(self, variables: Variables, query: str) -> Any:
        start, wanted = f"/storage/{variables['name']}/", variables.get("fileNames") or []
        edges = []
        for path, content in self.files.items():
            name = path.removeprefix(start)
            if path.startswith(start) and (not wanted or name in wanted):
                node = {"id": path, "name": name, "sizeBytes": len(content), **_FILE}
                edges.append({"cursor": path, "node": node | dict.fromkeys(("url", "directUrl"), self.url + path)})
        files = {"edges": edges, "pageInfo": _LAST_PAGE}
        return {"project": {"internalId": "7", "run": {"fileCount": len(edges), "files": files}}}

    def _project(self, name: str) -> dict[str, Any]:
        return {"id": "7", "name": name, "entity": {"id": "1", "name": ENTITY}}

    def _node(self, run: StoredRun, query: str = "RunFragment") -> dict[str, Any]:
        node = {
            **dict.fromkeys(("id", "name", "displayName"), run.name),
            **{"state": run.state, "group": run.group, "jobType": run.job_type, "historyLineCount": len(run.history)},
            **{"projectId": "7", "project": self._project(run.project), "user": {"name": "A Person", "username": "p"}},
            **_NODE,
        }
        if "RunFragment" in query:
            node |= {"config": run.config, "summaryMetrics": json.dumps(run.summary), "systemMetrics": "{}"}
            node |= {"historyKeys": {"lastStep": max((item["_step"] for item in run.history), default=-1)}}
        return node


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that ends closes its connections without a word


def _handler(server: LoopbackWandb) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self._body()
            if self.path.startswith("/sdk/otel/"):  # the client's own telemetry
                return self._send({})
            try:
                content = json.loads(body)
            except ValueError:
                server.unknown.append(f"POST {self.path}: {body[:100]!r}")
                return self._send({}, 404)
            wanted = "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()
            server.authorized &= self.headers.get("Authorization") == wanted
            if stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                server.stream(unquote(stream[1]), content)
                return self._send({"limits": {}})
            query = content["query"]
            named = re.search(r"(?:query|mutation)\s+(\w+)", query)
            operation = content.get("operationName") or (named[1] if named else "unnamed")
            return self._send(server.answer(operation, content.get("variables") or {}, query))

        def do_PUT(self) -> None:
            server.files[unquote(self.path)] = self._body()
            self._send({})

        def do_GET(self) -> None:
            found = server.files.get(unquote(self.path))
            self._send({} if found is None else found, 404 if found is None else 200)

        def _body(self) -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                body = b"".join(parts)
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        def _send(self, content: Any, status: int = 200) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler
