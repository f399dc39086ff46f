"""A server on 127.0.0.1 with the shape of the Hugging Face Hub, for the real client, with faults to inject.

What it has of the Hub: repos with branches and atomic commits, pre-upload, LFS batch and upload, resolve with ranges,
a second host name for LFS content (as the Hub's CDN, which must not get the token), model info, tree, tokens, private
and gated repos, validation of a card's metadata. What it lacks: Xet, pull requests, datasets, spaces.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = 'hf_valid'
READ_TOKEN = 'hf_read_only'

LICENSES = {'apache-2.0', 'mit', 'cc-by-4.0', 'cc-by-nc-4.0', 'other', 'unknown'}


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, str]] = field(default_factory=dict)  # commit -> path -> key of Hub.blobs
    log: list[str] = field(default_factory=list)  # commits, oldest first

    def commit(self, branch: str, files: dict[str, str], message: str) -> str:
        oid = hashlib.sha1(f'{len(self.log)} {message} {sorted(files.items())}'.encode()).hexdigest()
        self.commits[oid] = files
        self.refs[branch] = oid
        self.log.append(oid)
        return oid


@dataclass
class Fault:
    """What goes wrong with requests, `times` times.

    Attributes:
        request: Pattern of 'METHOD path'.
        status: Answer with this status and do nothing.
        headers: Headers of that answer.
        drop_after: Bytes of the body after which the connection breaks; -1 breaks it before the answer, but after the
            request was carried out.
        alter: What becomes of the body.
        delay: Seconds before the answer.
        times: How often.
    """

    request: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop_after: int | None = None
    alter: Callable[[bytes], bytes] | None = None
    delay: float = 0.0
    times: int = 1


class Refused(Exception):
    def __init__(self, status: int, code: str = '', message: str = '') -> None:
        self.status, self.code, self.message = status, code, message


class Hub:
    """State of the server.

    Attributes:
        repos: Repos by name.
        blobs: Contents by git SHA-1, or by SHA-256 for LFS.
        faults: Faults to come.
        requests: 'METHOD path' of every request so far, with ' token' behind it if it carried one.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.Lock()
        handler = type('BoundHandler', (Handler,), {'hub': self})
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        self.url = f'http://127.0.0.1:{self.port}'
        threading.Thread(target=self.server.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def count(self, pattern: str) -> int:
        """Number of requests so far that match a pattern."""
        return sum(re.search(pattern, request) is not None for request in self.requests)

    def files(self, name: str, revision: str = 'main') -> dict[str, bytes]:
        repo = self.repos[name]
        return {path: self.blobs[key] for path, key in repo.commits[repo.refs[revision]].items()}

    def put(self, name: str, files: dict[str, bytes], **flags: bool) -> Repo:
        """Make a repo with files that no client has pushed."""
        keys = {path: self.store(content, lfs=path.endswith(LFS_SUFFIXES)) for path, content in files.items()}
        repo = self.repos.setdefault(name, Repo(**flags))
        repo.commit('main', keys, 'put')
        return repo

    def store(self, content: bytes, lfs: bool) -> str:
        header = b'' if lfs else f'blob {len(content)}\0'.encode()
        key = (hashlib.sha256 if lfs else hashlib.sha1)(header + content).hexdigest()
        self.blobs[key] = content
        return key


LFS_SUFFIXES = ('.safetensors', '.png', '.bin')


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    wbufsize = -1  # headers and body in one packet, or every answer waits for the delayed acknowledgement of the first
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.route, self.query = unquote(url.path), parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if self.headers.get('Transfer-Encoding') == 'chunked':
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.token = (self.headers.get('Authorization') or '').removeprefix('Bearer ')
        request = f'{self.command} {self.route}'
        with self.hub.lock:
            self.hub.requests.append(request + (' token' if self.token else ''))
            self.fault = next((f for f in self.hub.faults if re.search(f.request, request)), None)
            if self.fault:
                self.fault.times -= 1
                if self.fault.times == 0:
                    self.hub.faults.remove(self.fault)
        if self.fault:
            time.sleep(self.fault.delay)
            if self.fault.status:
                self.send(self.fault.status, b'{"error": "injected"}', **self.fault.headers)
                return
        try:
            if self.token and self.token not in (TOKEN, READ_TOKEN):
                raise Refused(401, '', 'Invalid credentials in Authorization header')
            with self.hub.lock:
                found = self.dispatch()
        except Refused as e:
            found = (e.status, json.dumps({'error': e.message}).encode(), {'X-Error-Message': e.message})
            if e.code:
                found[2]['X-Error-Code'] = e.code
        self.send(found[0], found[1], **found[2])

    def send(self, status: int, body: bytes, **headers: str) -> None:
        fault = self.fault
        if fault and fault.alter and status in (200, 206):
            body = fault.alter(body)
        if fault and fault.drop_after == -1:
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(status)
        headers.setdefault('Content-Type', 'application/json')
        headers.setdefault('Content-Length', str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == 'HEAD':
            return
        if fault and fault.drop_after is not None:
            body = body[: fault.drop_after]
            self.close_connection = True
        try:
            self.wfile.write(body)
        except OSError:  # the client has gone
            self.close_connection = True

    def dispatch(self) -> tuple[int, bytes, dict[str, str]]:
        """Return status, body and headers."""
        repo_id = r'(?P<repo>[\w.-]+/[\w.-]+)'
        routes: list[tuple[str, Callable[..., Any]]] = [
            ('POST /api/repos/create', self.create),
            ('POST /api/validate-yaml', self.validate),
            (f'GET /api/models/{repo_id}(/revision/(?P<revision>.+))?', self.info),
            (f'GET /api/models/{repo_id}/tree/(?P<revision>[^/]+)', self.tree),
            (f'POST /api/models/{repo_id}/branch/(?P<branch>.+)', self.branch),
            (f'POST /api/models/{repo_id}/preupload/(?P<revision>.+)', self.preupload),
            (f'POST /api/models/{repo_id}/commit/(?P<revision>.+)', self.commit),
            (f'POST /{repo_id}[.]git/info/lfs/objects/batch', self.lfs_batch),
            ('PUT /lfs/(?P<oid>[0-9a-f]{64})', self.lfs_upload),
            ('(GET|HEAD) /cdn/(?P<oid>[0-9a-f]{64})', self.cdn),
            (f'(GET|HEAD) /{repo_id}/resolve/(?P<revision>[^/]+)/(?P<path>.+)', self.resolve),
        ]
        for pattern, handler in routes:
            match = re.fullmatch(pattern, f'{self.command} {self.route}')
            if match:
                found = handler(**match.groupdict())
                return found if isinstance(found, tuple) else (200, json.dumps(found).encode(), {})
        raise Refused(404, '', f'no route {self.route}')

    # Who may do what

    def readable(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.token):
            raise Refused(404 if self.token else 401, 'RepoNotFound', 'Repository not found')
        return repo

    def writable(self, name: str) -> Repo:
        self.need_write_token()
        return self.readable(name)

    def need_write_token(self) -> None:
        if not self.token:
            raise Refused(401, '', 'Invalid username or password.')
        if self.token != TOKEN:
            raise Refused(403, '', 'you must use a write token')

    def files_at(self, repo: Repo, revision: str) -> tuple[str, dict[str, str]]:
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            raise Refused(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return commit, repo.commits[commit]

    # Writing

    def create(self) -> Any:
        self.need_write_token()
        values = json.loads(self.body)
        name = f'{values["organization"]}/{values["name"]}'
        url = f'{self.hub.url}/{name}'
        if name in self.hub.repos:
            body = json.dumps({'error': 'You already created this model repo', 'url': url})
            return 409, body.encode(), {}
        repo = self.hub.repos[name] = Repo(private=values.get('visibility') == 'private' or bool(values.get('private')))
        repo.commit('main', {'.gitattributes': self.hub.store(b'*.safetensors filter=lfs\n', lfs=False)}, 'initial')
        return {'url': url, 'name': name}

    def validate(self) -> Any:
        match = re.match(r'---\n(.*?)\n---\n', json.loads(self.body)['content'], re.DOTALL)
        errors = []
        try:
            data = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as e:
            data, errors = {}, [str(e)]
        if data is None:
            return {'errors': [], 'warnings': [{'message': 'empty or missing yaml metadata'}]}
        if data.get('license', 'mit') not in LICENSES:
            errors.append(f'"license" must be one of [{", ".join(sorted(LICENSES))}]')
        for key in ('tags', 'datasets', 'metrics'):
            if not all(isinstance(v, str) for v in data.get(key) or []):
                errors.append(f'"{key}" must be a list of strings')
        for model in data.get('model-index') or []:
            for result in model['results']:
                if not {'type', 'name'} <= result['dataset'].keys() or not result['task'].get('type'):
                    errors.append('"model-index" needs task.type, dataset.type and dataset.name')
                if not all('type' in m and 'value' in m for m in result['metrics']):
                    errors.append('"model-index" needs type and value of a metric')
        body = json.dumps({'errors': [{'message': e} for e in errors], 'warnings': []}).encode()
        return 400 if errors else 200, body, {}

    def branch(self, repo: str, branch: str) -> Any:
        found = self.writable(repo)
        if branch in found.refs:
            raise Refused(409, '', f'Reference already exists: refs/heads/{branch}')
        found.refs[branch] = found.refs['main']
        return {}

    def preupload(self, repo: str, revision: str) -> Any:
        _, files = self.files_at(self.writable(repo), revision)
        modes = []
        for file in json.loads(self.body)['files']:
            mode = 'lfs' if file['path'].endswith(LFS_SUFFIXES) else 'regular'
            modes.append({'path': file['path'], 'uploadMode': mode, 'shouldIgnore': False})
            if file['path'] in files:
                modes[-1]['oid'] = files[file['path']]
        return {'files': modes}

    def lfs_batch(self, repo: str) -> Any:
        self.writable(repo)
        objects = []
        for item in json.loads(self.body)['objects']:
            objects.append({'oid': item['oid'], 'size': item['size']})
            if item['oid'] not in self.hub.blobs:
                objects[-1]['actions'] = {'upload': {'href': f'{self.hub.url}/lfs/{item["oid"]}', 'header': {}}}
        return {'transfer': 'basic', 'objects': objects}

    def lfs_upload(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, '', 'content does not match its oid')
        self.hub.blobs[oid] = self.body
        return {}

    def commit(self, repo: str, revision: str) -> Any:
        found = self.writable(repo)
        _, files = self.files_at(found, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]['value']
        if header.get('parentCommit', found.refs[revision]) != found.refs[revision]:
            raise Refused(412, '', 'A commit has happened since. Please refresh and try again.')
        files = dict(files)
        for line in lines[1:]:
            value = line['value']
            if line['key'] == 'file':
                files[value['path']] = self.hub.store(base64.b64decode(value['content']), lfs=False)
            elif line['key'] == 'lfsFile':
                if value['oid'] not in self.hub.blobs:
                    raise Refused(400, '', 'LFS pointer to a file that was not uploaded')
                files[value['path']] = value['oid']
            else:
                raise Refused(400, '', f'unknown operation {line["key"]}')
        oid = found.commit(revision, files, header['summary'])
        return {'commitUrl': f'{self.hub.url}/{repo}/commit/{oid}', 'commitOid': oid, 'success': True}

    # Reading

    def info(self, repo: str, revision: str | None) -> Any:
        found = self.readable(repo)
        commit, files = self.files_at(found, revision or 'main')
        siblings = [{'rfilename': path} for path in files]
        return {'id': repo, 'sha': commit, 'private': found.private, 'gated': found.gated, 'siblings': siblings}

    def tree(self, repo: str, revision: str) -> Any:
        _, files = self.files_at(self.readable(repo), revision)
        entries = []
        for path, key in sorted(files.items()):
            size = len(self.hub.blobs[key])
            entries.append({'type': 'file', 'path': path, 'size': size, 'oid': key[:40]})
            if len(key) == 64:
                entries[-1]['lfs'] = {'oid': key, 'size': size, 'pointerSize': 134}
        return entries

    def resolve(self, repo: str, revision: str, path: str) -> Any:
        found = self.readable(repo)
        if found.gated and self.token != TOKEN:
            raise Refused(403 if self.token else 401, 'GatedRepo', f'Access to model {repo} is restricted.')
        commit, files = self.files_at(found, revision)
        headers = {'X-Repo-Commit': commit}
        if path not in files:
            body = json.dumps({'error': 'Entry not found'}).encode()
            return 404, body, {**headers, 'X-Error-Code': 'EntryNotFound', 'X-Error-Message': 'Entry not found'}
        key = files[path]
        if len(key) == 64:
            headers['X-Linked-Etag'] = f'"{key}"'
            headers['X-Linked-Size'] = str(len(self.hub.blobs[key]))
            headers['Location'] = f'http://localhost:{self.hub.port}/cdn/{key}'
            return 302, b'', headers
        return self.content(self.hub.blobs[key], {**headers, 'ETag': f'"{key}"'})

    def cdn(self, oid: str) -> Any:
        return self.content(self.hub.blobs[oid], {'ETag': f'"{oid}"'})

    def content(self, body: bytes, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        headers = {**headers, 'Accept-Ranges': 'bytes', 'Content-Type': 'application/octet-stream'}
        match = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or '')
        if match is None:
            return 200, body, headers
        start, end = int(match[1]), int(match[2] or len(body) - 1)
        headers['Content-Range'] = f'bytes {start}-{end}/{len(body)}'
        return 206, body[start : end + 1], headers
