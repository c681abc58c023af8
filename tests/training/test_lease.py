"""One job at a time in a run folder: who holds it, who may take it over, who may write."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import asdict, replace

import pytest

from parallel_clip.engine.process import own_process_id, process_age
from parallel_clip.errors import InputError, LeaseLostError
from parallel_clip.training import lease
from parallel_clip.training.lease import take_lease


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(lease, "SEEN_SECONDS", 0.2)
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.02)


def write_holder(run_dir, number: int, process, beat: int = 0) -> None:
    folder = run_dir / "lease"
    folder.mkdir(parents=True, exist_ok=True)
    values = {"id": f"id {number}", "process": asdict(process), "beat": beat}
    (folder / f"{number:06d}.json").write_text(json.dumps(values))


def elsewhere():
    return replace(own_process_id(), host="another", boot="another boot", namespace="pid:[1]")


def test_taking_and_giving_back(tmp_path):
    run_dir = tmp_path / "new" / "run"
    held = take_lease(run_dir, print)
    held.check()
    assert held.token.is_seen()
    held.release()
    assert not (tmp_path / "new").exists(), "what was made for it goes with it"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").touch()
    take_lease(run_dir).release()
    assert [f.name for f in run_dir.iterdir()] == ["config.yaml"]


def test_a_holder_that_lives_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "STALE_SECONDS", 30.0)
    held = take_lease(tmp_path)
    said = []
    with pytest.raises(InputError, match=f"is in use: process {os.getpid()} on"):
        take_lease(tmp_path, said.append)
    assert "waiting up to 30 s" in said[0]
    held.check()
    held.release()


def test_a_holder_on_another_machine_that_shows_no_sign_is_stale(tmp_path):
    write_holder(tmp_path, 7, elsewhere())
    said = []
    held = take_lease(tmp_path, said.append)
    assert "shown no sign of life for 1 s; taking over" in said[-1]
    assert held.token.file.name == "000008.json"
    assert [f.name for f in (tmp_path / "lease").iterdir()] == ["000008.json"]
    held.release()


def _end_at_once() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_holder_that_is_known_to_be_gone_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "STALE_SECONDS", 1000.0)
    gone = multiprocessing.get_context("fork").Process(target=_end_at_once)
    gone.start()
    gone.join()
    write_holder(tmp_path, 1, replace(own_process_id(), pid=gone.pid))
    take_lease(tmp_path).release()
    # The process id is in use again, by another process.
    write_holder(tmp_path, 2, replace(own_process_id(), start=own_process_id().start - 1))
    take_lease(tmp_path).release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": 1}', "\x00\xff"])
def test_a_file_that_is_not_whole_is_waited_for(tmp_path, text):
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease" / "000001.json").write_text(text)
    take_lease(tmp_path).release()


def test_who_was_taken_over_may_not_write(tmp_path):
    stale = take_lease(tmp_path)
    stale._released.set()  # as if it had been stopped
    (tmp_path / "lease" / "000002.json").write_text("{}")
    with pytest.raises(LeaseLostError):
        stale.check()
    (tmp_path / "lease" / "000002.json").unlink()
    stale.check()
    stale.token.file.unlink()
    with pytest.raises(LeaseLostError):
        stale.check()
    assert not stale.token.wait_until_seen()


def test_of_several_that_come_at_once_one_gets_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "STALE_SECONDS", 30.0)
    context = multiprocessing.get_context("fork")
    results, others_done = context.Queue(), context.Event()

    def come() -> None:
        try:
            held = take_lease(tmp_path, lambda _: None)
            results.put(True)
            others_done.wait(60)
            held.release()
        except InputError:
            results.put(False)

    processes = [context.Process(target=come) for _ in range(5)]
    for process in processes:
        process.start()
    assert sorted(results.get() for _ in processes) == [False] * 4 + [True]
    others_done.set()
    for process in processes:
        process.join()


def test_clocks_play_no_part(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    write_holder(tmp_path, 1, elsewhere())
    os.utime(tmp_path / "lease" / "000001.json", (10**10, 10**10))
    take_lease(tmp_path).release()


def test_the_age_of_a_process():
    before = process_age()
    time.sleep(0.05)
    assert 0 < before < process_age()
