"""A local S3 server (moto) in a process of its own, and the requests in its log."""

import os
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path

import fsspec

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Server:
    """The process of the server."""

    def __init__(self, folder: Path, port: str = "0", *, host: str = "127.0.0.1", **environment: str) -> None:
        self.log = folder / "server.log"
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", host, "-p", port],
                stdout=out,
                stderr=out,
                env=os.environ | environment,
            )
        deadline = time.monotonic() + 500
        while not (found := re.search(rf"http://{re.escape(host)}:\d+", self.log.read_text())):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        self.address = found[0]
        self.environment = CREDENTIALS | {"AWS_ENDPOINT_URL": self.address}

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def asked(self) -> list[str]:
        """Return every request since the start: `PUT /bucket/name`."""
        return re.findall(r'"([A-Z]+ [^ ]+) HTTP', self.log.read_text())


def new_bucket() -> str:
    """Create a bucket and return an address in it."""
    name = f"b-{uuid.uuid4().hex[:12]}"
    s3().mkdir(name)
    return f"s3://{name}/some/prefix"


def s3():
    return fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)


def objects(url: str) -> dict[str, int]:
    """Return the names and sizes of the objects below an address."""
    place = url.partition("://")[2]
    return {n.removeprefix(f"{place}/"): i["size"] for n, i in s3().find(place, detail=True).items()}
