"""Stores as they are: slow, silent, denying, with signed addresses, and a real S3 server."""

import os
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from parallel_clip.config import config_from_dict
from parallel_clip.data.feeding import workers
from parallel_clip.data.feeding.run_shards import find_run_shards
from parallel_clip.data.feeding.workers import read_ahead, report_progress
from parallel_clip.data.index.beside import INDEX_NAME
from parallel_clip.data.index.renew import renew_index
from parallel_clip.data.index.shard_table import check_shards, find_shards
from parallel_clip.data.storage import addresses, disks
from parallel_clip.data.storage.addresses import (
    StorageSettings,
    configure_storage,
    fetch_part,
    remote_stat,
    without_signature,
)
from parallel_clip.data.storage.disks import network_kind, pages_folder
from parallel_clip.data.storage.files import parent_and_name
from parallel_clip.data.storage.progress import print_nothing
from parallel_clip.errors import InputError
from tests.data.http_server import serve
from tests.data.shard_files import index_shards, read_all, sample, write_shard, write_shards

pytest.importorskip("aiohttp")


@pytest.fixture(autouse=True)
def storage(tmp_path, monkeypatch):
    monkeypatch.setenv("PARALLEL_CLIP_CACHE", str(tmp_path / "cache"))
    yield configure_storage
    configure_storage(StorageSettings())


@pytest.fixture
def no_waits(monkeypatch):
    monkeypatch.setattr(addresses.time, "sleep", lambda seconds: None)


@pytest.fixture
def served(tmp_path):
    write_shards(tmp_path / "shards", [3, 4])
    with serve(tmp_path / "shards") as server:
        yield server


# ------------------------------------------------------------------------------ slow and silent


def test_a_slow_store_is_waited_for_as_long_as_bytes_come(served, storage):
    """Longer than the time-out in all, never without a byte for so long."""
    storage(StorageSettings(timeout=0.4, retries=0))
    served.pause, served.piece = 0.2, 1000
    began = time.monotonic()
    data = fetch_part(f"{served.address}/000000.tar", 0, 8000)
    assert len(data) == 8000 and time.monotonic() - began > 3 * 0.4


def test_a_store_that_falls_silent_has_failed_and_the_speed_is_said(served, storage, no_waits):
    storage(StorageSettings(timeout=0.3, retries=1))
    address = f"{served.address}/000000.tar"
    fetch_part(address, 0, 5000)
    served.stops_after, served.piece = 2000, 1000
    with pytest.raises(OSError) as caught:
        fetch_part(address, 0, 8000)
    message = str(caught.value)
    assert address in message and "no byte came for 0.3 s, which is data.timeout" in message
    assert "tried 2 times, as data.retries says" in message and "MB/s" in message


class SlowData:
    """What a worker reads, a sample of which takes longer than a worker may be stuck."""

    def __init__(self, address: str):
        self.address = address

    def __getitem__(self, number: int) -> int:
        report_progress(number)
        return len(fetch_part(self.address, 0, 8000))

    def describe_position(self, *numbers: int) -> str:
        return f"sample {numbers[0]}"


def test_a_worker_that_waits_for_a_store_is_not_stuck(served, storage, monkeypatch):
    monkeypatch.setattr(workers, "_SECONDS_BETWEEN_LOOKS", 1)
    monkeypatch.setattr(addresses, "_SECONDS_BETWEEN_BEATS", 0.2)
    served.pause, served.piece = 0.5, 1000
    assert list(read_ahead(SlowData(f"{served.address}/000000.tar"), [0], 1, 1, patience=1)) == [
        8000
    ]


def test_an_answer_shorter_than_asked_is_asked_for_again(served, storage, no_waits):
    storage(StorageSettings(retries=1))
    served.short_answers = 1
    assert len(fetch_part(f"{served.address}/000000.tar", 0, 5000)) == 5000
    served.short_answers = 2
    with pytest.raises(OSError, match="bytes 0 to 5,000 were asked for, 2,500 came.*tried 2 times"):
        fetch_part(f"{served.address}/000000.tar", 0, 5000)


def test_retries_are_a_setting(served, storage, no_waits):
    storage(StorageSettings(retries=2))
    served.failures = 2
    assert len(fetch_part(f"{served.address}/000000.tar", 0, 100)) == 100
    served.failures = 3
    with pytest.raises(OSError, match="503.*tried 3 times"):
        fetch_part(f"{served.address}/000000.tar", 0, 100)
    assert served.failures == 0


# ------------------------------------------------------------------------- denied and not there


@pytest.mark.parametrize("look", [remote_stat, lambda address: fetch_part(address, 0, 10)])
@pytest.mark.parametrize(
    "status, kind, words",
    [
        (403, PermissionError, r"access is denied \(403\)"),
        (401, PermissionError, r"access is denied \(401\)"),
        (404, FileNotFoundError, r"no such file \(404\)"),
        (410, OSError, r"the server refuses \(410\)"),
    ],
)
def test_denied_and_missing_are_told_apart_at_once(served, storage, look, status, kind, words):
    served.status = status
    began = time.monotonic()
    with pytest.raises(kind, match=words):
        look(f"{served.address}/000000.tar")
    assert time.monotonic() - began < 0.9  # the first wait between tries is half a second or more


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_what_passes_is_tried_again(served, storage, no_waits, status):
    storage(StorageSettings(retries=1))
    served.status = status
    with pytest.raises(OSError, match=f"{status}.*tried 2 times"):
        remote_stat(f"{served.address}/000000.tar")


def test_shards_that_are_missing_or_denied_are_named_before_anything_is_read(served, tmp_path):
    pattern = f"{served.address}/{{000000..000002}}.tar"
    with pytest.raises(InputError, match="1 of 3 shards do not exist: .*000002.tar"):
        index_shards(pattern, print_nothing)
    assert served.requests == []
    served.status = 403
    with pytest.raises(InputError, match="^shard http.*access is denied"):
        index_shards(pattern, print_nothing)


def test_shards_that_are_denied_are_left_out_where_missing_ones_are(served, tmp_path):
    """A store without the right to list says so of what is not there."""
    served.denied.add("/000002.tar")
    tree = {
        "train": {"steps": 1},
        "data": {
            "train": [{"shards": f"{served.address}/{{000000..000002}}.tar"}],
            "missing": "skip",
            "max_missing_fraction": 0.4,
        },
    }
    said = []
    shards = find_run_shards(config_from_dict(tree), said.append)
    assert shards.orders[0].samples_per_epoch == 7
    assert any("000002.tar: access is denied (403)" in line for line in said)
    tree["data"]["missing"] = "error"
    with pytest.raises(InputError, match="000002.tar: access is denied"):
        find_run_shards(config_from_dict(tree), print_nothing)


def test_pages_in_place_of_files_beside_shards_are_none(served):
    """A server that answers with HTML what it does not have."""
    served.page = b"<html>Welcome</html>"
    assert index_shards(f"{served.address}/000000.tar", print_nothing).counts.tolist() == [3]


# --------------------------------------------------------------------------------- what changed


def test_an_index_beside_the_shards_is_fetched_again_where_it_changed(served, tmp_path):
    folder = tmp_path / "shards"
    pattern = f"{served.address}/{{000000..000001}}.tar"
    renew_index(str(folder), print_nothing)
    said = []
    assert index_shards(pattern, said.append).counts.tolist() == [3, 4]
    assert any(f"index of 2 shards fetched from {served.address}" in line for line in said)
    said = []
    index_shards(pattern, said.append)
    assert not any("fetched" in line for line in said)

    write_shard(folder / "000001.tar", {f"new{n}": sample(n) for n in range(6)})
    renew_index(str(folder), print_nothing)
    said = []
    assert index_shards(pattern, said.append).counts.tolist() == [3, 6]
    assert any("has changed and was fetched again: 0 shards are new" in line for line in said)
    assert any("1 are other ones" in line for line in said)


def test_shards_that_only_this_machine_indexed_stay_when_the_index_is_fetched_again(
    served, tmp_path
):
    folder = tmp_path / "shards"
    renew_index(str(folder / "000000.tar"), print_nothing)
    pattern = f"{served.address}/{{000000..000001}}.tar"
    assert index_shards(pattern, print_nothing).counts.tolist() == [3, 4]
    (folder / INDEX_NAME).unlink()
    write_shard(folder / "000000.tar", {f"new{n}": sample(n) for n in range(5)})
    renew_index(str(folder / "000000.tar"), print_nothing)
    served.requests.clear()
    assert index_shards(pattern, print_nothing).counts.tolist() == [5, 4]
    assert {path for path, _ in served.requests} == {f"/{INDEX_NAME}"}


@pytest.mark.parametrize("same_size", [False, True])
def test_a_shard_that_changed_at_its_address_is_named_and_renewed(served, tmp_path, same_size):
    pattern = f"{served.address}/{{000000..000001}}.tar"
    index_shards(pattern, print_nothing)
    shard = tmp_path / "shards" / "000001.tar"
    if same_size:
        size = shard.stat().st_size
        write_shard(shard, {f"9000{n}": sample(n) for n in range(3, 7)})
        assert shard.stat().st_size == size
    else:
        write_shard(shard, {f"new{n}": sample(n) for n in range(9)})
    os.utime(shard, (1.7e9, 1.7e9))
    words = "is another one of as many bytes" if same_size else "bytes, but had"
    with pytest.raises(InputError, match=f"000001.tar .*{words}"):
        index_shards(pattern, print_nothing)
    said = []
    renewed = renew_index(pattern, said.append)
    assert said[0] == f"changed since indexed: {served.address}/000001.tar"
    assert read_all(renewed) == read_all(index_shards(str(tmp_path / "shards"), print_nothing))


# ------------------------------------------------------------------------------ signed addresses


@pytest.mark.parametrize(
    "query",
    [
        "X-Amz-Algorithm=A&X-Amz-Expires=60&X-Amz-Signature={}",
        "X-Goog-Signature={}&X-Goog-Date=1",
        "sv=2024&se=2026-01-01&sig={}",
        "AWSAccessKeyId=A&Signature={}&Expires=1",
    ],
)
def test_a_new_signature_is_the_same_file(served, query):
    first, second = (f"{served.address}/000000.tar?{query.format(key)}" for key in ("a/b", "c"))
    assert without_signature(first) == without_signature(second) == f"{served.address}/000000.tar"
    assert parent_and_name(first) == (served.address, "000000.tar")
    expected = read_all(index_shards(first, print_nothing))
    served.requests.clear()
    said = []
    assert read_all(index_shards(second, said.append)) == expected
    assert served.requests == [] and not any("making" in line for line in said)


def test_another_query_names_another_file():
    for address in ("https://host/get?file=a.tar", "https://host/a.tar?version=3"):
        assert without_signature(address) == address
    for signed, name in {
        "https://h/get?file=a.tar&sig=aa&se=2026": "https://h/get?file=a.tar",
        "https://h/a.tar?versionId=7&X-Amz-Date=1&X-Amz-Signature=a": "https://h/a.tar?versionId=7",
        "https://h/a.tar?Expires=1&Signature=a~b&Key-Pair-Id=K": "https://h/a.tar",
    }.items():
        assert without_signature(signed) == name
    assert parent_and_name("https://h/d/get?file=x/a.tar") == ("https://h/d", "get?file=x/a.tar")
    assert parent_and_name("/data/odd?sig=1.tar") == ("/data", "odd?sig=1.tar")


def test_shards_that_differ_only_in_their_query_are_told_apart(served):
    """As of a server that takes the file's name there."""
    first, second = (f"{served.address}/get?file=00000{n}.tar&sig={n}" for n in (0, 1))
    assert read_all(index_shards([first, second], print_nothing)) == read_all(
        index_shards(f"{served.address}/{{000000..000001}}.tar", print_nothing)
    )
    with pytest.raises(InputError, match="are one shard but for what signs them"):
        index_shards([first, f"{served.address}/get?file=000000.tar&sig=other"], print_nothing)


# ------------------------------------------------------------------------------------------- S3


@pytest.fixture(scope="module")
def s3():
    """A real S3 server on this machine, and a client of its own."""
    pytest.importorskip("s3fs")
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id="a",
        aws_secret_access_key="b",
        region_name="us-east-1",
    )
    yield endpoint, client
    server.stop()


@pytest.fixture
def bucket(s3, tmp_path, storage, monkeypatch):
    endpoint, client = s3
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"bucket-{time.time_ns()}"
    client.create_bucket(Bucket=name)
    storage(StorageSettings({"s3": {"endpoint_url": endpoint, "use_listings_cache": False}}))
    for path in write_shards(tmp_path / "local", [2] * 10):
        client.upload_file(str(path), name, f"laion/{path.name}")
    return name


def test_shards_on_s3_from_bucket_to_samples(bucket, s3, tmp_path):
    pattern = f"s3://{bucket}/laion/{{000000..000009}}.tar"
    local = index_shards(str(tmp_path / "local"), print_nothing)
    expected = read_all(local)
    made = renew_index(pattern, print_nothing, out=tmp_path / "out")
    assert read_all(made) == expected
    s3[1].upload_file(str(tmp_path / "out" / INDEX_NAME), bucket, f"laion/{INDEX_NAME}")
    said = []
    found = find_shards(pattern, said.append)
    assert said == [f"index of 10 shards fetched from s3://{bucket}/laion/{INDEX_NAME}"]
    check_shards(found)
    assert read_all(found) == expected
    assert np.array_equal(found.table_checksums(), local.table_checksums())
    listed = find_shards(f"s3://{bucket}/laion/", print_nothing)
    assert [parent_and_name(path)[1] for path in listed.paths] == [
        f"{n:06d}.tar" for n in range(10)
    ]


def test_an_index_made_before_the_upload_serves_on_s3(bucket, s3, tmp_path):
    index_shards(str(tmp_path / "local"), print_nothing)
    s3[1].upload_file(str(tmp_path / "local" / INDEX_NAME), bucket, f"laion/{INDEX_NAME}")
    pattern = f"s3://{bucket}/laion/{{000000..000009}}.tar"
    found = find_shards(pattern, print_nothing)
    check_shards(found)
    said = []
    renew_index(pattern, said.append)
    assert not any("making the index" in line for line in said)
    # One written after the index beside it is scanned again, though it has the same size.
    time.sleep(1.1)  # stores tell time in seconds
    s3[1].upload_file(str(tmp_path / "local" / "000004.tar"), bucket, "laion/000004.tar")
    renew_index(pattern, said.append)
    assert f"changed since indexed: s3://{bucket}/laion/000004.tar" in said


def test_a_shard_exchanged_on_s3_is_told_by_its_etag(bucket, s3, tmp_path):
    pattern = f"s3://{bucket}/laion/{{000000..000009}}.tar"
    index_shards(pattern, print_nothing)
    data = (tmp_path / "local" / "000007.tar").read_bytes().replace(b"00014.", b"90014.")
    s3[1].put_object(Bucket=bucket, Key="laion/000007.tar", Body=data)
    with pytest.raises(InputError, match="000007.tar is another one of as many bytes"):
        index_shards(pattern, print_nothing)
    s3[1].delete_object(Bucket=bucket, Key="laion/000003.tar")
    with pytest.raises(InputError, match="1 of 10 shards do not exist: .*000003.tar"):
        index_shards(pattern, print_nothing)


def test_a_bucket_that_is_not_there_is_said_at_once(bucket):
    began = time.monotonic()
    with pytest.raises(InputError, match="2 of 2 shards do not exist: s3://no-such-bucket/0.tar"):
        index_shards("s3://no-such-bucket/{0..1}.tar", print_nothing)
    assert time.monotonic() - began < 15  # tries again would take half a minute


def test_signed_addresses_of_s3_are_read(bucket, s3, tmp_path):
    def signed(seconds: int) -> list[str]:
        return [
            s3[1].generate_presigned_url(
                "get_object",
                {"Bucket": bucket, "Key": f"laion/00000{n}.tar"},
                ExpiresIn=seconds,
            )
            for n in (0, 1)
        ]

    first, second = signed(600), signed(900)
    assert first != second
    expected = read_all(index_shards(str(tmp_path / "local"), print_nothing))[:4]
    assert read_all(index_shards(first, print_nothing)) == expected
    said = []
    assert read_all(index_shards(second, said.append)) == expected
    assert not any("making the index" in line for line in said)


@pytest.mark.parametrize(
    "options, sent",
    [
        ({"anon": True}, {"Authorization": None}),
        ({"requester_pays": True}, {"x-amz-request-payer": "requester"}),
        ({"s3": {"requester_pays": True}}, {"x-amz-request-payer": "requester"}),
    ],
)
def test_options_reach_the_store(storage, monkeypatch, options, sent):
    """Seen by a server that notes what it is sent."""
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    headers = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers.append(dict(self.headers))
            self.send_response(206)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"data")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = {"endpoint_url": f"http://127.0.0.1:{server.server_address[1]}"}
    inner = options.get("s3", options)
    storage(
        StorageSettings(
            {"s3": {**inner, **endpoint}} if "s3" in options else {**options, **endpoint}
        )
    )
    assert fetch_part("s3://bucket/a.tar", 0, 4) == b"data"
    server.shutdown()
    lower = {name.lower(): value for name, value in headers[-1].items()}
    for name, value in sent.items():
        assert lower.get(name.lower()) == value


@pytest.mark.parametrize("value", [3, None, "anon", [1]])
def test_options_by_kind_are_mappings(value):
    with pytest.raises(InputError, match=r"data.storage_options.https is .*expected a mapping"):
        StorageSettings({"https": value})


def test_options_that_a_web_server_does_not_take_are_named(served, storage):
    storage(StorageSettings({"foo": 1}))
    began = time.monotonic()
    with pytest.raises(InputError, match="data.storage_options are not those of http://.*foo"):
        fetch_part(f"{served.address}/000000.tar", 0, 4)
    assert time.monotonic() - began < 5


def test_options_that_a_store_does_not_take_are_named(storage):
    storage(StorageSettings({"no_such_option": 1}))
    with pytest.raises(InputError, match="data.storage_options are not those of s3://.*no_such"):
        fetch_part("s3://bucket/a.tar", 0, 4)


# --------------------------------------------------------------------------- where pages are kept

MOUNTS = """\
overlay / overlay rw 0 0
server:/home /home nfs4 rw 0 0
/dev/nvme0n1 /home/local ext4 rw 0 0
mds@tcp:/scratch /scratch lustre rw 0 0
bucket /mnt/b fuse.s3fs rw 0 0
//nas/x /mnt/my\\040nas cifs rw 0 0
/dev/sda /homework xfs rw 0 0
"""


@pytest.mark.parametrize(
    "folder, kind",
    [
        ("/home/me", "nfs4"),
        ("/home", "nfs4"),
        ("/home/local/me", None),
        ("/scratch/me/x", "lustre"),
        ("/mnt/b", "fuse.s3fs"),
        ("/mnt/my nas/x", "cifs"),
        ("/homework/me", None),
        ("/tmp", None),
    ],
)
def test_network_disks_are_told_from_a_machines_own(folder, kind):
    assert network_kind(Path(folder), MOUNTS) == kind


def test_pages_are_kept_on_the_machines_own_disk(tmp_path, monkeypatch):
    chosen = pages_folder()
    assert chosen.path == tmp_path / "cache" / "pages" and "PARALLEL_CLIP_CACHE" in chosen.reason
    monkeypatch.delenv("PARALLEL_CLIP_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert pages_folder().path == tmp_path / "home" / ".cache" / "parallel_clip" / "pages"
    monkeypatch.setattr(
        disks, "network_kind", lambda path: "nfs4" if path == tmp_path / "home" else None
    )
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    chosen = pages_folder()
    assert chosen.path.parent.parent == tmp_path and chosen.path.parent.name.startswith("parallel_")
    assert "network disk (nfs4)" in chosen.reason
