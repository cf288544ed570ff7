"""The endpoints of the local Hub: what a request without a fault is answered, and who may ask."""

from __future__ import annotations

import base64
import fnmatch
import json
import re
from urllib.parse import parse_qs, quote, unquote, urlencode

from aiohttp import web
from local_hub_store import REPO_NAME, Problem, Repo, check_card, now

VERBS = "revision|settings|auth-check|preupload|commit|tree|paths-info|refs|commits|branch|tag|discussions"
API = re.compile(
    rf"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+?|[^/]+)(/(?P<verb>{VERBS})(/(?P<rest>.+))?)?"
)
RESOLVE = re.compile(r"/((?P<kind>datasets|spaces)/)?(?P<id>[^/]+(/[^/]+)?)/(?P<verb>resolve)/(?P<rest>.+)")
LFS = re.compile(
    r"/((?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/(?P<verb>objects/batch|verify)(?P<rest>)"
)
# With a token that may read, these only read although they are POST.
READING = {"post_paths_info", "post_verify"}


class Call:
    """A request while it is answered: who asks, for which repository, and the rest of the path in pieces."""

    def __init__(self, request: web.Request, body: bytes, who: dict | None):
        self.method, self.headers, self.body, self.who = request.method, request.headers, body, who
        self.query = parse_qs(request.rel_url.raw_query_string)
        self.path, self.repo, self.rest = request.rel_url.raw_path, None, []

    @property
    def json(self) -> dict:
        try:
            return json.loads(self.body or b"{}")
        except ValueError as error:
            raise Problem(400, "Invalid JSON") from error

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[-1].lower() in ("1", "true")

    def revision(self) -> tuple[str, str]:
        """Revision and path, the revision being one piece or `refs/…/…`."""
        n = 3 if self.rest[0] == "refs" else 1
        return "/".join(self.rest[:n]), "/".join(self.rest[n:])


class Api:
    """Answers requests; the server around it is in local_hub.py."""

    # --- who may do what ---------------------------------------------------------------------------------------------

    def _who(self, request: web.Request) -> dict | None:
        header = request.headers.get("Authorization")
        if header is None:
            return None
        account = self.tokens.get(header.removeprefix("Bearer "))
        if account is None:
            raise Problem(401, "Invalid credentials in Authorization header")
        return {"orgs": [], "role": "write", **account}

    def _owns(self, who: dict | None, owner: str) -> bool:
        return who is not None and owner in (who["user"], *who["orgs"])

    def _need_writer(self, who: dict | None, owner: str | None = None) -> None:
        if who is None:
            raise Problem(401, "Invalid username or password.")
        if who["role"] != "write" or (owner is not None and not self._owns(who, owner)):
            what = (
                "a token with write access is needed" if who["role"] != "write" else f'not in the namespace "{owner}"'
            )
            raise Problem(403, f"You don't have the rights for this: {what}")

    def _need_access(self, who: dict | None, repo: Repo) -> None:
        if repo.gated and not self._owns(who, repo.owner) and (who or {}).get("user") not in repo.granted:
            text = f"Access to {repo.kind[:-1]} {repo.id} is restricted and you are not in the authorized list."
            raise Problem(401 if who is None else 403, text, "GatedRepo")

    # --- answers -----------------------------------------------------------------------------------------------------

    def _answer(self, call: Call, port: int):
        """JSON, or status, headers and body."""
        method = {"HEAD": "get"}.get(call.method, call.method.lower())
        if self.cdn.endswith(f":{port}"):
            return self._cdn(call, method)
        simple = call.path.removeprefix("/api/").replace("/", "_").replace("-", "_")
        if call.path.startswith("/api/") and (handler := getattr(self, f"{method}_{simple}", None)):
            return handler(call)
        if call.path in ("/api/models", "/api/datasets", "/api/spaces") and method == "get":
            return self._list(call, call.path.rpartition("/")[2])
        found = API.fullmatch(call.path) or LFS.fullmatch(call.path) or RESOLVE.fullmatch(call.path)
        if not found:
            raise Problem(404, "Sorry, we can't find the page you are looking for.")
        call.repo = repo = self.repos.get((found["kind"] or "models", unquote(found["id"])))
        call.rest = [unquote(piece) for piece in (found["rest"] or "").split("/") if piece]
        if repo is None or (repo.private and not self._owns(call.who, repo.owner)):
            raise Problem(404, "Repository not found", "RepoNotFound")
        name = f"{method}_{(found['verb'] or 'revision').replace('-', '_').rpartition('/')[2]}"
        handler = getattr(self, name, None)
        if handler is None:
            raise Problem(404, f"Not there: {name}")
        if method != "get" and name not in READING:
            # Anybody with a token that writes may propose: a discussion, a pull request, and the files that it needs.
            proposal = call.flag("create_pr") or name == "post_discussions"
            target = call.revision()[0] if call.rest else "main"
            if name == "post_batch":
                target = call.json.get("ref", {}).get("name")
                proposal |= target is None
            opened = [
                f"refs/pr/{d['num']}" for d in repo.discussions if d["author"]["name"] == (call.who or {}).get("user")
            ]
            proposal |= target in opened
            self._need_writer(call.who, None if proposal else repo.owner)
        return handler(call)

    def _page(self, call: Call, items: list, size: int):
        """A page of a list, with a Link to the next one."""
        start = int(call.query.get("cursor", ["0"])[0])
        headers = {}
        if start + size < len(items):
            query = urlencode({**call.query, "cursor": start + size}, doseq=True)
            headers["Link"] = f'<{self.url}{call.path}?{query}>; rel="next"'
        return 200, headers, items[start : start + size]

    # --- endpoints: method and the word of the address ---------------------------------------------------------------

    def get_whoami_v2(self, call: Call):
        if call.who is None:
            raise Problem(401, "Invalid username or password.")
        user, role = call.who["user"], call.who["role"]
        orgs = [{"type": "org", "id": o, "name": o, "fullname": o, "roleInOrg": "write"} for o in call.who["orgs"]]
        answer = {"type": "user", "id": user, "name": user, "fullname": user.title(), "isPro": False, "orgs": orgs}
        return {**answer, "auth": {"type": "access_token", "accessToken": {"displayName": "tests", "role": role}}}

    def post_validate_yaml(self, call: Call):
        errors, warnings = check_card(call.json["content"], call.json["repoType"] + "s")
        answer = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        return 400 if errors else 200, {}, answer

    def _named(self, call: Call) -> tuple[str, str, str]:
        """Kind, namespace and name in the body of create and delete, once the caller may write there."""
        self._need_writer(call.who)
        kind, owner = call.json.get("type", "model") + "s", call.json.get("organization") or call.who["user"]
        self._need_writer(call.who, owner)
        return kind, owner, call.json["name"]

    def post_repos_create(self, call: Call):
        kind, owner, name = self._named(call)
        if not REPO_NAME.fullmatch(name):
            raise Problem(400, f"Invalid repository name: {name}")
        repo_id = f"{owner}/{name}"
        answer = {
            "url": f"{self.url}/{'' if kind == 'models' else kind + '/'}{repo_id}",
            "name": repo_id,
            "id": repo_id,
        }
        if any((kind, repo_id.lower()) == (k, i.lower()) for k, i in self.repos):
            raise Problem(409, f"You already created this {kind[:-1]} repo", **answer)
        private = call.json.get("visibility") == "private" or bool(call.json.get("private"))
        self.new_repo(kind, repo_id, private, call.who["user"])
        return answer

    def new_repo(self, kind: str, repo_id: str, private: bool, author: str) -> Repo:
        repo = Repo(kind, repo_id, private, author, self.objects, self.lfs_above)
        self.repos[kind, repo_id] = repo
        return repo

    def delete_repos_delete(self, call: Call):
        kind, owner, name = self._named(call)
        if self.repos.pop((kind, f"{owner}/{name}"), None) is None:
            raise Problem(404, "Repository not found", "RepoNotFound")
        return {}

    def put_settings(self, call: Call):
        call.repo.gated = call.json.get("gated", call.repo.gated)
        call.repo.private = {"private": True, "public": False}.get(call.json.get("visibility"), call.repo.private)
        return {"private": call.repo.private, "gated": call.repo.gated}

    def get_auth_check(self, call: Call):
        self._need_access(call.who, call.repo)
        if call.rest == ["write"]:
            self._need_writer(call.who, call.repo.owner)
        return {}

    def _list(self, call: Call, kind: str):
        query, found = call.query, []
        for (k, _), repo in sorted(self.repos.items(), key=lambda item: item[1].resolve("main").date, reverse=True):
            if k != kind or (repo.private and not self._owns(call.who, repo.owner)):
                continue
            info = repo.info(repo.resolve("main"))
            tags = {*info["tags"], repo.id, info.get("library_name"), info.get("pipeline_tag")}
            fits = all(author.lower() == repo.owner.lower() for author in query.get("author", []))
            fits &= all(word.lower() in repo.id.lower() for word in query.get("search", []))
            fits &= tags.issuperset([*query.get("filter", []), *query.get("pipeline_tag", [])])
            if fits:
                drop = set() if call.flag("full") else {"siblings"}
                drop |= set() if call.flag("full") or call.flag("cardData") else {"cardData"}
                drop |= set() if call.flag("config") else {"config"}
                found.append(self._expand(call, {key: info[key] for key in info if key not in drop}, info))
        return self._page(call, found, int(query.get("limit", [self.page_size])[0]))

    def _expand(self, call: Call, plain: dict, info: dict) -> dict:
        wanted = call.query.get("expand", []) + call.query.get("expand[]", [])
        return {key: info[key] for key in info if key in ("_id", "id", *wanted)} if wanted else plain

    def get_revision(self, call: Call):
        commit = call.repo.resolve(call.revision()[0] if call.rest else "main")
        info = call.repo.info(commit, call.flag("blobs"))
        return self._expand(call, info, info)

    def get_tree(self, call: Call):
        revision, folder = call.revision()
        expand, commit = call.flag("expand"), call.repo.resolve(revision)
        size = min(self.page_size, 50) if expand else self.page_size
        return self._page(call, call.repo.tree(commit, folder, call.flag("recursive"), expand), size)

    def post_paths_info(self, call: Call):
        form = parse_qs(call.body.decode()) if "json" not in call.headers.get("Content-Type", "") else call.json
        expand = str(form.get("expand", [""])).lower().strip("[']") == "true"
        commit = call.repo.resolve(call.revision()[0])
        found = [call.repo.describe(commit, path.strip("/"), expand) for path in form.get("paths", [])]
        return [item for item in found if item]

    def get_resolve(self, call: Call):
        repo, (revision, path) = call.repo, call.revision()
        if path != "README.md":
            self._need_access(call.who, repo)
        commit = repo.resolve(revision)
        headers = {"X-Repo-Commit": commit.sha}
        entry = commit.files.get(path)
        if entry is None:
            raise Problem(404, "Entry not found", "EntryNotFound", headers)
        headers["ETag"] = f'"{entry.oid}"'
        if entry.sha256 is None:
            return self._content(call, self.objects.get(entry), headers)
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
        headers["Location"] = self._signed("GET", f"/cdn/{repo.kind}/{repo.id}/{entry.sha256}/{quote(path)}")
        return 302, headers, b""

    def post_preupload(self, call: Call):
        commit = call.repo.resolve(call.revision()[0])
        ignored = [
            line.strip() for line in call.json.get("gitIgnore", "").splitlines() if line.strip()[:1] not in ("", "#")
        ]
        files = []
        for file in call.json["files"]:
            path, entry = file["path"], commit.files.get(file["path"])
            mode = call.repo.upload_mode(commit, path, file["size"], base64.b64decode(file["sample"]))
            ignore = any(fnmatch.fnmatch(path, p) or path.startswith(p.strip("/") + "/") for p in ignored)
            known = {"oid": entry.sha256 or entry.oid} if entry else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": ignore, **known})
        return {"files": files, "commitOid": commit.sha}

    def post_batch(self, call: Call):
        repo, objects = call.repo, []
        for item in call.json["objects"]:
            oid, size = item["oid"], item["size"]
            objects.append({"oid": oid, "size": size})
            if oid in repo.lfs:
                continue
            path = f"/cdn/{repo.kind}/{repo.id}/{oid}"
            upload: dict = {"href": self._signed("PUT", path)}
            if size > self.part_size:
                numbers = range(1, -(-size // self.part_size) + 1)
                header = {f"{n:05d}": self._signed("PUT", path, part=n) for n in numbers}
                upload = {"href": self._signed("POST", path), "header": {"chunk_size": str(self.part_size), **header}}
            verify = {"href": f"{self.url}/{repo.path}.git/info/lfs/verify"}
            objects[-1]["actions"] = {"upload": upload, "verify": verify}
        transfer = "multipart" if any("header" in o.get("actions", {}).get("upload", {}) for o in objects) else "basic"
        return {"transfer": transfer, "objects": objects}

    def post_verify(self, call: Call):
        self._need_writer(call.who)
        oid = call.json["oid"]
        if oid not in call.repo.lfs or (self.objects.folder / oid).stat().st_size != call.json["size"]:
            raise Problem(404, "Object not found")
        return {}

    def post_commit(self, call: Call):
        repo, revision, user = call.repo, call.revision()[0], call.who["user"]
        lines = [json.loads(line) for line in call.body.splitlines() if line.strip()]
        if not lines or lines[0]["key"] != "header":
            raise Problem(400, "The first line has to be the header")
        base, header = repo.resolve(revision), lines[0]["value"]
        if header.get("parentCommit") not in (None, base.sha):
            raise Problem(412, "A commit has happened since. Please refresh and try again.")
        files = repo.apply(base, [(line["key"], line["value"]) for line in lines[1:]])
        title, message, answer = header["summary"], header.get("description", ""), {}
        if call.flag("create_pr"):
            number = self._open(repo, title, message, user, True, "open")["num"]
            ref, answer["pullRequestUrl"] = f"refs/pr/{number}", f"{self.url}/{repo.path}/discussions/{number}"
        else:
            ref = revision if revision in repo.refs else f"refs/heads/{revision}"
            if ref not in repo.refs or ref.startswith("refs/tags/"):
                raise Problem(404, f"Not a branch: {revision}", "RevisionNotFound")
        sha = repo.write(ref, files, title, user, message, (base.sha,)).sha
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo.path}/commit/{sha}", **answer}

    def get_commits(self, call: Call):
        keys = ("title", "message", "date")
        chain = call.repo.history(call.repo.resolve(call.revision()[0]))
        items = [{"id": c.sha, "authors": [{"user": c.author}], **{k: getattr(c, k) for k in keys}} for c in chain]
        return self._page(call, items, self.page_size)

    def get_refs(self, call: Call):
        answer: dict = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for ref, sha in call.repo.refs.items():
            _, kind, name = ref.split("/", 2)
            where = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}[kind]
            answer[where].append({"name": name, "ref": ref, "targetCommit": sha})
        if "include_prs" not in call.query:
            del answer["pullRequests"]
        return answer

    def _point(self, call: Call, ref: str, revision: str):
        if ref in call.repo.refs:
            raise Problem(409, "Reference already exists")
        call.repo.refs[ref] = call.repo.resolve(revision).sha
        return {}

    def _unpoint(self, call: Call, ref: str):
        if ref == "refs/heads/main":
            raise Problem(403, "The main branch cannot be deleted")
        if call.repo.refs.pop(ref, None) is None:
            raise Problem(404, f"No such reference: {ref}", "RevisionNotFound")
        return {}

    def post_branch(self, call: Call):
        return self._point(call, f"refs/heads/{'/'.join(call.rest)}", call.json.get("startingPoint", "main"))

    def delete_branch(self, call: Call):
        return self._unpoint(call, f"refs/heads/{'/'.join(call.rest)}")

    def post_tag(self, call: Call):
        return self._point(call, f"refs/tags/{call.json['tag']}", call.revision()[0])

    def delete_tag(self, call: Call):
        return self._unpoint(call, f"refs/tags/{'/'.join(call.rest)}")

    # --- discussions and pull requests -------------------------------------------------------------------------------

    def _open(self, repo: Repo, title: str, text: str, user: str, pull_request: bool, status: str) -> dict:
        number = len(repo.discussions) + 1
        item = {"num": number, "title": title, "author": {"name": user}, "createdAt": now(), "status": status}
        item |= {"repo": {"name": repo.id, "type": repo.kind[:-1]}, "isPullRequest": pull_request, "events": []}
        if pull_request:
            item |= {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": False, "diff": ""}
            repo.refs[f"refs/pr/{number}"] = repo.resolve("main").sha
        repo.discussions.append(item)
        self._event(item, user, "comment", edited=False, hidden=False, latest={"raw": text})
        return item

    def _event(self, item: dict, user: str, kind: str, **data) -> dict:
        event = {"id": f"{item['num']}-{len(item['events'])}", "type": kind, "createdAt": now()}
        event |= {"author": {"name": user}, "data": data}
        item["events"].append(event)
        return event

    def get_discussions(self, call: Call):
        if call.rest:
            return self._discussion(call)
        kind, status = (call.query.get(key, ["all"])[0] for key in ("type", "status"))
        items = [d for d in call.repo.discussions if kind == "all" or d["isPullRequest"] == (kind == "pull_request")]
        items = [d for d in items if status == "all" or (d["status"] in ("open", "draft")) == (status == "open")]
        items = [d for d in items if d["author"]["name"] in call.query.get("author", [d["author"]["name"]])]
        start = 10 * int(call.query.get("p", ["0"])[0])
        return {"discussions": items[start : start + 10], "count": len(items), "start": start}

    def _discussion(self, call: Call) -> dict:
        number = int(call.rest[0])
        if not 0 < number <= len(call.repo.discussions):
            raise Problem(404, "Discussion not found")
        return call.repo.discussions[number - 1]

    def post_discussions(self, call: Call):
        user, data = call.who["user"], call.json
        if not call.rest:
            pull_request = bool(data.get("pullRequest"))
            status = "draft" if pull_request else "open"
            return self._open(call.repo, data["title"], data.get("description", ""), user, pull_request, status)
        item, action = self._discussion(call), call.rest[1]
        if action == "comment":
            text = {"raw": data["comment"]}
            return {"newMessage": self._event(item, user, "comment", edited=False, hidden=False, latest=text)}
        self._need_writer(call.who, call.repo.owner)
        if action == "merge":
            if not item["isPullRequest"] or item["status"] not in ("open", "draft"):
                raise Problem(400, "This pull request cannot be merged")
            item["changes"]["mergeCommitId"] = call.repo.merge(item["num"], user).sha
        elif action != "status":
            raise Problem(404, f"Not there: {action}")
        item["status"] = data["status"] if action == "status" else "merged"
        return {"newStatus": self._event(item, user, "status-change", status=item["status"])}
