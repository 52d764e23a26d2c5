"""A Hugging Face Hub on 127.0.0.1, as far as huggingface_hub asks it for models."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories of files by name, and what has been asked for."""

    def __init__(self):
        self.repositories = {}  # "org/name" → {file name: bytes}
        self.revisions = {"main": COMMIT, "v1": COMMIT, COMMIT: COMMIT}
        self.refusals = {}  # "org/name" or "files of org/name" → (status, X-Error-Code)
        self.visibility = {}  # of repositories that were made
        self.asked = []  # (method, path)

    @property
    def downloaded(self):
        """The files fetched, of whatever repository and revision."""
        return [
            re.sub(r"^/.*?/resolve/[^/]+/", "", p)
            for m, p in self.asked
            if "/resolve/" in p and m == "GET"
        ]

    def take(self, path, headers, body):
        """(status, JSON) of what is sent to be kept."""
        if headers.get("Authorization") != "Bearer good":
            return 401, {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            there = repo in self.repositories
            if not there:
                self.repositories[repo] = {}
                private = asked.get("private") or asked.get("visibility") == "private"
                self.visibility[repo] = "private" if private else "public"
            return (409 if there else 200), {"url": f"{self.address}/{repo}"}
        repo, action = re.fullmatch(
            r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path
        ).groups()
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular"}
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": [{**file, "shouldIgnore": False} for file in files]}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                data = base64.b64decode(line["value"]["content"])
                self.repositories[repo][line["value"]["path"]] = data
        address = f"{self.address}/{repo}/commit/{COMMIT}"
        return 200, {"commitOid": COMMIT, "commitUrl": address}

    def answer(self, method, path, headers):
        """(status, headers, body) of one request."""
        self.asked.append((method, path))
        if path == "/api/whoami-v2":
            good = headers.get("Authorization") == "Bearer good"
            return (200 if good else 401), {}, b'{"name": "me", "type": "user"}'
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/([^/]+))?", path):
            repo, revision, name = match[1], match[2] or "main", None
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, name = match.groups()
        else:
            return 404, {}, b""
        asked = f"files of {repo}" if name and repo not in self.refusals else repo
        if asked in self.refusals and headers.get("Authorization") != "Bearer good":
            status, code = self.refusals[asked]
            return status, {"X-Error-Code": code} if code else {}, b""
        if repo not in self.repositories:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if revision not in self.revisions:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files, commit = self.repositories[repo], self.revisions[revision]
        if name is None:
            siblings = [{"rfilename": file} for file in files]
            body = json.dumps({"id": repo, "sha": commit, "siblings": siblings, "private": False})
            return 200, {"Content-Type": "application/json"}, body.encode()
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        etag = hashlib.sha256(files[name]).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, files[name]


@contextlib.contextmanager
def serving(hub):
    """The address at which the hub answers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = self.path.split("?")[0]
            status, headers, body = hub.answer(self.command, path, self.headers)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, content = hub.take(self.path.split("?")[0], self.headers, body)
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        yield hub.address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
