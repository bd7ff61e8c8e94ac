import multiprocessing
import pickle

import pytest
import servers
import synthetic

from compodistill.errors import StoreError, UsageError
from compodistill.store import create_store, open_store

pytest.importorskip("obstore")
SHARDS = ("a.tar", "b.tar")


@pytest.fixture(scope="module")
def moto():
    with servers.moto() as port:
        yield port


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    port = servers.free_port()
    with servers.localbucket(tmp_path_factory.mktemp("bucket"), port):
        yield port


@pytest.fixture
def at(monkeypatch):
    """Point the client at a port."""

    def point(port):
        for name, value in (servers.KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}).items():
            monkeypatch.setenv(name, value)

    return point


@pytest.fixture
def url(request):
    return f"s3://bucket/{request.node.name.partition('[')[0]}"


def write(url, codec="lossless", shards=SHARDS, **options):
    spec = synthetic.spec(codec=codec)
    writer = create_store(url, spec, **options)
    for i, name in enumerate(shards):
        write_fragment(writer, name, synthetic.zoo(spec, i, name))
    writer.seal([synthetic.sha(n) for n in shards])
    return spec


def write_fragment(writer, name, samples):
    with writer.fragment(name, synthetic.sha(name)) as f:
        for s in samples:
            f.add(s)


def check(url, spec, **options):
    store = open_store(url, **options)
    for i, name in enumerate(SHARDS):
        for s in synthetic.zoo(spec, i, name):
            synthetic.assert_equal(store[s.key], s)
    return store


def test_a_store_in_object_storage_is_the_store_on_the_disk(moto, at, url, tmp_path):
    at(moto)
    source = tmp_path / "teacher"
    source.mkdir()
    (source / "config.json").write_text("{}")
    create_store(url, synthetic.spec()).add_teacher_files(source)
    spec = write(url, concurrent=True)
    write(url)  # again: harmless
    store = check(url, spec)
    create_store(tmp_path / "s", synthetic.spec()).add_teacher_files(source)
    write(tmp_path / "s")
    assert store.info.content_sha256 == open_store(tmp_path / "s").info.content_sha256
    assert (store.teacher_dir() / "config.json").read_text() == "{}"
    synthetic.assert_equal(pickle.loads(pickle.dumps(store))["a.tar-long"], synthetic.zoo(spec, 0, "a.tar")[4])


def test_two_different_results_for_one_shard_are_an_error(moto, at, url):
    at(moto)
    spec = write(url)
    writer = create_store(url, spec)
    samples = synthetic.zoo(spec, 0, "a.tar")
    samples[0].attention[0, 0, 0] += 1e-6
    with pytest.raises(StoreError, match="two results for one shard differ"):
        write_fragment(writer, "a.tar", samples)
    check(url, spec)


@pytest.mark.parametrize("kind", ["503", "reset", "lost"])
def test_faults_of_the_network_leave_a_whole_store(bucket, at, kind, url):
    url += kind
    with servers.Proxy(bucket, lambda method, path, n: kind if n % 5 == 0 else None) as proxy:
        at(proxy.port)
        check(url, write(url))
        assert len(proxy.faults) > 5


@pytest.mark.parametrize("server", ["keeps metadata", "keeps none"])
def test_a_write_whose_answer_was_lost_is_recognised_as_ours(server, moto, bucket, at, url):
    from compodistill.store.remote import ObjectStorage

    first = []

    def lose_first_put(method, path, n):
        if method == "PUT" and not first:
            first.append(path)
            return "lost"
        return None

    with servers.Proxy(moto if server == "keeps metadata" else bucket, lose_first_put) as proxy:
        at(proxy.port)
        storage = ObjectStorage(url)
        assert storage.create("x", b"ours")
        assert [m for m, _ in proxy.requests].count("PUT") == 2
        assert not storage.create("x", b"theirs")
        assert storage.read("x", 10) == b"ours"


def test_slow_answers_are_waited_for(bucket, at, url):
    with servers.Proxy(bucket, lambda method, path, n: "slow" if n == 3 else None) as proxy:
        at(proxy.port)
        check(url, write(url))


def test_a_server_killed_in_the_middle_leaves_nothing_half_published(tmp_path, at, monkeypatch):
    from compodistill.store import remote

    monkeypatch.setattr(remote, "RETRIES", {"max_retries": 0})
    port, url = servers.free_port(), "s3://bucket/store"
    at(port)
    with servers.localbucket(tmp_path / "data", port) as process:
        spec = synthetic.spec()
        writer = create_store(url, spec)
        create, count = remote.ObjectStorage.create, []

        def create_then_die(self, path, data):
            count.append(path)
            if len(count) == 4:
                process.kill()
                process.wait()
            return create(self, path, data)

        monkeypatch.setattr(remote.ObjectStorage, "create", create_then_die)
        with pytest.raises(StoreError, match="did not answer"):
            write_fragment(writer, "a.tar", synthetic.zoo(spec, 0, "a.tar"))
    monkeypatch.undo()
    at_again = {**servers.KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    for name, value in at_again.items():
        monkeypatch.setenv(name, value)
    with servers.localbucket(tmp_path / "data", port):
        assert not create_store(url, spec).finished(synthetic.sha("a.tar"))
        assert len(open_store(url, allow_partial=True)) == 0
        check(url, write(url))


@pytest.mark.parametrize("server", ["nanio", "stripping proxy"])
def test_servers_that_ignore_conditional_writes_are_found_out_and_refused_for_several_writers(
    server, bucket, at, url, tmp_path
):
    from compodistill.store.remote import ObjectStorage

    def run(port):
        at(port)
        assert not ObjectStorage(url).probe()
        with pytest.raises(UsageError, match="ignores conditional writes"):
            create_store(url, synthetic.spec(), concurrent=True)
        check(url, write(url))

    if server == "nanio":
        with servers.nanio(tmp_path / "data") as port:
            run(port)
    else:
        with servers.Proxy(bucket, lambda *_: "unconditional") as proxy:
            run(proxy.port)


def test_missing_fragments_and_objects_are_named(moto, at, url):
    import obstore
    from obstore.store import from_url

    at(moto)
    spec = write(url)
    bucket = from_url(url, client_options={"allow_http": True})
    gone = f"fragments/{synthetic.sha('a.tar')}"
    store = open_store(url)
    objects = store.fragment(synthetic.sha("a.tar")).objects
    obstore.delete(bucket, f"{gone}/" + next(p for p in objects if p.startswith("logits_") and p.endswith("/0")))
    with pytest.raises(StoreError, match="missing"):
        [store[key] for key in store.keys(synthetic.sha("a.tar"))]
    for meta in [m for chunk in obstore.list(bucket, prefix=gone) for m in chunk]:
        obstore.delete(bucket, meta["path"])
    with pytest.raises(StoreError, match="1 of 2 fragments are missing"):
        open_store(url)
    assert len(open_store(url, allow_partial=True)) == len(synthetic.zoo(spec))


def test_a_web_server_serves_a_store_and_refuses_to_be_written(bucket, at, url):
    at(bucket)
    spec = write(url)
    with servers.Proxy(bucket, lambda *_: None) as proxy:  # a plain server of files, as far as a reader can see
        place = f"http://127.0.0.1:{proxy.port}/bucket/{url.rpartition('/')[2]}"
        check(place, spec)
        with pytest.raises(UsageError, match="cannot be written"):
            create_store(place, spec)


def test_fsspec_serves_what_obstore_does_not(tmp_path):
    import fsspec

    spec = write(tmp_path / "s")
    fsspec.filesystem("memory").put(str(tmp_path / "s"), "/cdist-test", recursive=True)
    check("memory://cdist-test", spec)


def test_the_cache_answers_without_the_server_and_keeps_its_limit(bucket, at, url, tmp_path, monkeypatch):
    from compodistill.store import cache

    monkeypatch.setattr(cache, "BLOCK", 4096)
    with servers.Proxy(bucket, lambda *_: None) as proxy:
        at(proxy.port)
        spec = write(url)
        check(url, spec, cache_dir=tmp_path / "cache")
        store = check(url, spec, cache_dir=tmp_path / "cache")
        store.fragment(synthetic.sha("a.tar"))
        before = len([r for r in proxy.requests if r[0] == "GET"])
        store["a.tar-long"]
        assert len([r for r in proxy.requests if r[0] == "GET"]) == before
        check(url, spec, cache_dir=tmp_path / "small", cache_bytes=10_000)
        assert sum(f.stat().st_size for f in (tmp_path / "small").iterdir()) <= 10_000 + 4096


def test_a_damaged_cache_is_found(moto, at, url, tmp_path):
    at(moto)
    spec = write(url)
    check(url, spec, cache_dir=tmp_path / "cache")
    for file in (tmp_path / "cache").iterdir():
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    with pytest.raises(StoreError):
        check(url, spec, cache_dir=tmp_path / "cache")


def _read_in_child(store, queue):
    try:
        queue.put(store["a.tar-long"].key)
    except UsageError as e:
        queue.put(e.what)


@pytest.mark.parametrize(
    ("method", "says"), [("spawn", "a.tar-long"), ("fork", "a remote store cannot be used in a forked process")]
)
def test_remote_stores_work_in_spawned_workers_and_say_so_in_forked_ones(moto, at, url, method, says):
    at(moto)
    write(url + method)
    store = open_store(url + method)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_read_in_child, args=(store, queue))
    process.start()
    assert queue.get(timeout=60) == says
    process.join(10)
    assert process.exitcode == 0
