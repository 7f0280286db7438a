"""A server that speaks as much of the hub's protocol as the real client needs to read one data set: what test_data.py asks."""

import contextlib
import http.server
import json
import os
import threading
from urllib.parse import unquote

SHA = "a" * 40


def respond(path, files):
    """A GET request's path, and the data set's files by name -> (status, headers, body)."""
    if "/resolve/" in path:
        body = files.get(path.split("/resolve/")[1].split("/", 1)[1])
        if body is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"ETag": f'"{len(body)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}, body
    if "/tree/" in path:
        folder = path.split(SHA)[1].strip("/")
        entries = [{"type": "file", "path": f, "size": len(b), "oid": SHA} for f, b in files.items() if os.path.dirname(f) == folder]
        if not folder:
            entries += [{"type": "directory", "path": d, "oid": SHA} for d in {os.path.dirname(f) for f in files} - {""}]
        return 200, {}, json.dumps(entries).encode()
    return 200, {}, json.dumps({"id": "owner/name", "sha": SHA, "siblings": [{"rfilename": f} for f in files]}).encode()


@contextlib.contextmanager
def hub(home, files, refusal=None):
    """Serve `files` as owner/name, or refuse everything with that error code; yields the environment for a client's process."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            status, headers, body = respond(unquote(self.path.split("?")[0]), files)
            if refusal:
                status, headers, body = 403, {"X-Error-Code": refusal}, b""
            if status == 200 and "Range" in self.headers:
                start, end = (int(number) for number in self.headers["Range"].removeprefix("bytes=").split("-"))
                headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
                status, body = 206, body[start : end + 1]
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    yield environment | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    server.shutdown()
