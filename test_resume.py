"""A run that cannot be lost: saver.py and resume.py. `python -m pytest test_resume.py`.

As in test_vit.py a test's name is the claim and its docstring the specification. Whole runs are
train.main's with testing.TRAIN_FLAGS, several of them one after the other in one process.
"""

import json
import os
import re
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import checkpoint
import data
import resume
import samples
import saver as saving
import train
from checkpoint import complete_checkpoints, load_checkpoint, read_meta
from configs import TrainConfig
from flags import to_plain
from model import ViT
from parallel import Grid, ShardedOptimizer
from plan import run_length
from saver import Saver
from testing import (
    TINY,
    TRAIN_FLAGS,
    Few,
    full_weights,
    grid_of,
    losses,
    optimizer_of,
    run_ranks,
    save_checkpoint,
)
from train import learning_rate


def names(root):
    return sorted(path.name for path in Path(root).iterdir())


@pytest.fixture
def optimizer():
    return optimizer_of(ViT(TINY), Grid())


# ----------------------------------------------------------------------------- saving
def _save_beside(folder):
    """What two ranks see whose writing waits for `release`, that of the second one longer."""
    grid, root, said, release = grid_of(1), Path(folder), [], threading.Event()
    original, last = saving.write_synced, grid.world.rank == grid.world.size - 1

    def slow(path, write):
        if fail and last:
            raise OSError("the disk is on fire")
        release.wait()
        time.sleep(0.3 * last)
        original(path, write)
    saving.write_synced, fail = slow, False
    optimizer = optimizer_of(ViT(TINY, grid), grid)
    stop = train.Run(TrainConfig(precision="fp32"), TINY, grid, torch.device("cpu"),
                     micro_batch=2).stop
    saver = Saver(root, optimizer, room=1e9, say=said.append)
    before = {(name, kind): x for name, kind, x in optimizer.full_tensors()}
    saver.begin(1, dict(note="x"))
    for bucket in optimizer.buckets:  # as an update does, while nothing is written yet
        bucket.master.add_(1)
    polls, empty = 0, not list(root.glob("step_*"))
    for _ in range(3):
        stop.poll(saver.written)
        saver.publish(stop.written)
    seen = [empty and saver.newest is None, saver.note]
    release.set()
    while saver.newest is None:
        polls, alive = polls + 1, saver.thread.is_alive()
        stop.poll(saver.written)
        saver.publish(stop.written)
        time.sleep(0.01)
    seen[0] &= not alive  # publishing did not wait for the disk
    load_checkpoint(root / "step_00000001", optimizer)
    seen.append(all(torch.equal(x, before[n, k]) for n, k, x in optimizer.full_tensors()))
    saver.begin(2, {})
    saver.begin(3, {})
    saver.wait()
    seen.append((polls, said, names(root)))
    torch.distributed.barrier()
    fail = True
    release.clear()  # rank 0 goes on writing
    saver.begin(4, {})
    with pytest.raises(OSError, match="step 4 failed, earlier ones are untouched: rank 1 could not "
                                      "write .*the disk is on fire"):
        while True:
            stop.poll(saver.written)
            saver.publish(stop.written)
    release.set()
    (root / "file").write_text("")
    saver.root = root / "file"  # rank 0 alone makes the directory
    with pytest.raises(OSError, match="step 5 failed, earlier ones are untouched: rank 0 could not "
                                      "begin .*: .*Not a directory"):
        saver.begin(5, {})
    name = next(name for bucket in optimizer.buckets for name, p in bucket.params.items()
                if bucket.offsets[name] >= bucket.numel // 2 and p.unique().numel() > 9)
    file = root / "step_00000003" / read_meta(root / "step_00000003")["where"][name]
    if last:
        flip(file, optimizer, name)
    torch.distributed.barrier()
    with pytest.raises(checkpoint.Damaged, match=f"{file.name}, weight of {name}"):
        load_checkpoint(root / "step_00000003", optimizer)
    return seen


def flip(file, optimizer, name, kind="weight"):
    """Flips one bit of the last value of a saved tensor."""
    tensor = torch.load(file, weights_only=True)[name][kind]
    content = bytearray(file.read_bytes())
    at = content.index(tensor.numpy().tobytes()) + 4 * tensor.numel() - 2
    content[at] ^= 1
    file.write_bytes(content)


def test_saving_goes_on_beside_the_training(tmp_path):
    """On 2 ranks: begin returns while nothing can be written, and nothing is published; both
    publish at the same poll, after the slower one has written; what is saved is the state at begin,
    whatever was updated since. A second save waits for the first and says so. A rank that cannot
    write while the other still does, a directory that cannot be made, a tensor that is damaged and
    that one rank alone reads: an error on both, and the earlier checkpoints stay."""
    (first, second), _, _ = run_ranks(2, _save_beside, str(tmp_path))
    for nothing_yet, note, as_begun, (polls, _, found) in (first, second):
        assert nothing_yet and as_begun and polls > 1
        assert note.startswith("saving beside the training")
        assert found == ["step_00000001", "step_00000002", "step_00000003"]
    assert first[3][0] == second[3][0]
    assert first[3][1] == ["step 3: waiting until the checkpoint of step 2 is written"]
    assert [p.name for p in complete_checkpoints(tmp_path)] == [
        "step_00000001", "step_00000002", "step_00000003"]
    assert not list(tmp_path.glob(".step_*"))


def test_without_the_memory_a_save_is_made_at_once(optimizer, tmp_path, monkeypatch):
    """With room for all but one byte the log says what is short, and begin leaves a complete
    checkpoint; with just enough it does not, and what is saved is from before an update that comes
    meanwhile. Each tensor has a storage of its own in the file."""
    need = 12 * TINY.num_params
    short, enough = (Saver(tmp_path, optimizer, room=room) for room in (need - 1, need))
    short.begin(1, {})
    assert complete_checkpoints(tmp_path) == [short.newest] == [tmp_path / "step_00000001"]
    assert short.note.startswith("saving stops the training: beside it, it would take")
    assert enough.note.startswith("saving beside the training")
    release, write, before = threading.Event(), saving.write_synced, full_weights(optimizer)
    monkeypatch.setattr(saving, "write_synced", lambda *args: release.wait() and write(*args))
    enough.begin(2, {})
    assert enough.newest is None
    for bucket in optimizer.buckets:
        bucket.master.add_(1)
    release.set()
    enough.wait()
    load_checkpoint(enough.newest, optimizer)
    assert all(torch.equal(x, before[name]) for name, x in full_weights(optimizer).items())
    for step in (1, 2):
        saved = torch.load(tmp_path / f"step_{step:08d}" / "rank_00000.pt", weights_only=True)
        tensors = [x for kinds in saved.values() for x in kinds.values()]
        assert all(x.untyped_storage().nbytes() == 4 * x.numel() for x in tensors)


def test_the_newest_the_best_and_what_was_just_written_are_kept(optimizer, tmp_path):
    """keep_last 1, keep_best 2: of the scores .1 .9 .3 .9 - .2 the last two of .9 stay; `best` is
    the later of equal ones, and is what evaluate.py finds there. What was just written stays beside
    a checkpoint of a later step. An evaluation made up after a restart counts."""
    root = tmp_path / "checkpoints"
    saver = Saver(root, optimizer, keep_last=1, keep_best=2)
    for step, top1 in enumerate((0.1, 0.9, 0.3, 0.9, None, 0.2), 1):
        saver.begin(step, dict(result=top1 and dict(val_top1=top1)))
    saver.wait()
    assert names(root) == ["step_00000002", "step_00000004", "step_00000006"]
    assert checkpoint.newest_checkpoint(tmp_path / "best").resolve().name == "step_00000004"
    saver.begin(5, {})
    saver.wait()
    assert names(root) == [f"step_0000000{step}" for step in (2, 4, 5, 6)]
    saver.scored(dict(val_top1=0.95))
    saver.wait()
    assert names(root) == [f"step_0000000{step}" for step in (4, 5, 6)]
    assert (tmp_path / "best").resolve().name == "step_00000005"


def test_an_error_between_the_renames_loses_nothing(optimizer, tmp_path, monkeypatch):
    """A step that is saved again, with an error in the second rename: the first one is back at
    once; with a crash there, at the next start, which also clears what dead saves and removals
    left."""
    root = tmp_path / "checkpoints"
    one = save_checkpoint(root, 1, optimizer, dict(note="first"))
    rename = os.rename

    def fail(source, target):
        if str(source).endswith(".tmp"):
            raise OSError("no")
        rename(source, target)
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="could not publish .*step_00000001: no"):
        save_checkpoint(root, 1, optimizer, dict(note="second"))
    assert names(root) == ["step_00000001"] and read_meta(one)["note"] == "first"
    monkeypatch.undo()
    os.rename(one, root / ".step_00000001.old")
    for left in (".step_00000001.tmp", ".step_00000002.gone"):
        (root / left).mkdir()
        (root / left / "rank_00000.pt").write_text("")
    lock, lines = resume.claim_output(tmp_path)
    assert len(lines) == 1 and lines[0].startswith(f"putting back {one}")
    assert names(root) == ["step_00000001"] and read_meta(one)["note"] == "first"
    shutil.copytree(one, root / ".step_00000001.old")  # crashed after the second rename
    lock, lines = resume.claim_output(tmp_path)
    assert lines == [] and names(root) == ["step_00000001"]


# ----------------------------------------------------------------------------- reading
def test_a_flipped_bit_is_found_and_the_checkpoint_before_goes_on(optimizer, tmp_path):
    """In any tensor of the newest checkpoint: named by file and tensor, and the one before is
    loaded; where all are damaged, or the damaged one was asked for, it is an error."""
    one, two = (save_checkpoint(tmp_path, step, optimizer, {}) for step in (1, 2))
    whole = (two / "rank_00000.pt").read_bytes()
    for name, kind in [("cls_token", "weight"), ("head.weight", "weight"), ("norm.bias", "weight")]:
        with torch.no_grad():
            optimizer.model.get_parameter(name).add_(torch.rand(1))  # so that its bytes are found
        two = save_checkpoint(tmp_path, 2, optimizer, {})
        flip(two / "rank_00000.pt", optimizer, name, kind)
        path, meta, lines = checkpoint.load_newest([two, one], optimizer)
        assert (path, meta["step"], len(lines)) == (one, 1, 1)
        assert f"{two} is damaged: rank_00000.pt, {kind} of {name}" in lines[0]
        with pytest.raises(ValueError, match="skipping a damaged checkpoint"):
            checkpoint.load_newest([two], optimizer)
        with pytest.raises(checkpoint.Damaged):
            checkpoint.CheckpointTensors(two)(name, kind)
    (two / "rank_00000.pt").write_bytes(b"0" * len(whole))  # of the right size, no file of torch's
    assert checkpoint.load_newest([two, one], optimizer)[0] == one


def test_a_flipped_bit_of_the_facts_is_found_too(optimizer, tmp_path):
    """Each bit of meta.json, one at a time: of what it says none changes without a checkpoint that
    is no complete one any more, so that an earlier one goes on."""
    file = save_checkpoint(tmp_path, 1, optimizer, dict(note="x", score=0.25)) / "meta.json"
    content, told, kept = file.read_bytes(), read_meta(file.parent), 0
    for at in range(0, 8 * len(content), 13):
        changed = bytearray(content)
        changed[at // 8] ^= 1 << at % 8
        file.write_bytes(changed)
        if checkpoint.incomplete_reason(file.parent) is None:  # a space, or the checksum's name
            meta, kept = json.loads(changed), kept + 1
            assert {key: meta[key] for key in told if key != "checksum"} == {
                key: told[key] for key in told if key != "checksum"}
    assert kept < len(content) / 50


@pytest.mark.parametrize("key", ["files", "where"])
def test_a_checkpoint_names_no_file_outside(key, optimizer, tmp_path):
    """meta.json with a path in place of a file's name is refused, though that file is there."""
    one = save_checkpoint(tmp_path / "a", 1, optimizer, {})
    shutil.copy(one / "rank_00000.pt", tmp_path / "rank_00000.pt")
    meta = json.loads((one / "meta.json").read_text())
    outside = "../../rank_00000.pt"
    if key == "files":
        meta["files"][outside] = meta["files"]["rank_00000.pt"]
    else:
        meta["where"]["norm.bias"] = outside
    (one / "meta.json").write_text(json.dumps(meta))
    assert complete_checkpoints(tmp_path / "a") == []
    with pytest.raises(ValueError, match=f"meta.json names {outside}, which is no file of"):
        load_checkpoint(one, optimizer)


# ----------------------------------------------------------------------------- one writer, one line
def test_a_refused_run_leaves_the_folders_that_were_there(tmp_path):
    """What it made goes; a folder that was there stays though empty, as do files of others."""
    def refused(*there):
        for path in there:
            (tmp_path / path).mkdir(parents=True)
        with pytest.raises(ValueError, match="is no directory"):
            resume.open_output(str(tmp_path / "out"), "nowhere", locks := [])
        return locks[0][1]
    for there in ((), ("out",), ("out/checkpoints",)):
        resume.leave_output(refused(*there))
        assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == (
            ["out", *there] if there == ("out/checkpoints",) else [*there])
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    made = refused()
    (tmp_path / "out/index.npz").write_text("")
    resume.leave_output(made)
    assert names(tmp_path / "out") == ["index.npz"]


def test_a_lock_that_a_refused_run_removes_is_made_anew(tmp_path, monkeypatch):
    """Between another run's open and its claim: that lock is of no name and would guard nothing."""
    lockf, gone = resume.fcntl.lockf, [tmp_path / ".lock"]
    monkeypatch.setattr(resume.fcntl, "lockf", lambda lock, how: (
        gone and os.remove(gone.pop()), lockf(lock, how)))
    lock, _ = resume.claim_output(tmp_path)
    assert os.path.samestat(os.fstat(lock.fileno()), os.stat(tmp_path / ".lock"))


def _claim(folder):
    try:
        held = resume.claim_output(Path(folder))
    except ValueError as e:
        return str(e)
    os._exit(9) if held and os.environ["RANK"] == "0" else None


def test_an_output_directory_has_one_writer(tmp_path):
    """A second process is refused with the first one's number and host, before anything is cleared
    away; a process that has died does not hold the lock, nor do the workers it forked."""
    lock, _ = resume.claim_output(tmp_path)
    (tmp_path / "checkpoints" / ".step_00000001.tmp").mkdir()  # the first one's save under way
    worker = os.fork()
    if worker == 0:
        time.sleep(60)
        os._exit(0)
    (message,), _, _ = run_ranks(1, _claim, str(tmp_path))
    assert f"is being written by process {os.getpid()} on {os.uname().nodename};" in message
    assert names(tmp_path / "checkpoints") == [".step_00000001.tmp"]
    lock.close()
    for _ in range(2):
        _, codes, _ = run_ranks(1, _claim, str(tmp_path), check=False)
        assert codes == [9]
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)


def test_the_length_of_a_run_follows_the_images_seen():
    """--epochs: resumed in the middle with a smaller, larger or odd batch, a run ends less than one
    batch before the same image, its learning rate goes on at the same place of the cosine, and
    reaches the same end. --max-steps counts steps. What is over by more than a batch is refused."""
    config = TrainConfig(epochs=10, global_batch_size=50, warmup_steps=10)
    assert run_length(config, 1000) == run_length(config, 1000, 80, 80 * 50) == (200, 0.0)
    rate = learning_rate(100, config, 200)
    for batch in (20, 100, 96):
        other = replace(config, global_batch_size=batch)
        total, shift = run_length(other, 1000, 100, 5000)
        assert 0 <= 10_000 - (5000 + (total - 100) * batch) < batch
        warm = replace(other, warmup_steps=0), replace(config, warmup_steps=0)
        assert learning_rate(100 + shift, warm[0], total + shift) == pytest.approx(
            learning_rate(100, warm[1], 200), rel=0.02)  # a schedule ends a step before its length
        assert learning_rate(total - 1 + shift, other, total + shift) == config.min_lr < rate
    assert run_length(replace(config, epochs=0.01), 1000) == (1, 0.0)
    assert run_length(replace(config, epochs=0.01), 1000, 1, 50) == (1, 0.0)
    assert run_length(replace(config, epochs=5), 1000, 100, 5000) == (100, 0.0)
    steps = replace(config, max_steps=7, global_batch_size=64)
    assert run_length(steps, 1000, 6, 300) == run_length(steps, 1000, 7, 350) == (7, 0.0)
    for bad in (replace(config, epochs=4.9), steps):
        with pytest.raises(ValueError, match="step 100 has seen 5.00 epochs, more than"):
            run_length(bad, 1000, 100, 5000)


def test_what_changes_the_model_is_refused_by_name(optimizer, tmp_path):
    """GELU, epsilon, pixel mean and deviation: an error that names them and both values. Another
    number of images is said; dropout may change."""
    vit, config = to_plain(TINY), to_plain(TrainConfig())
    one = save_checkpoint(tmp_path, 1, optimizer, dict(
        vit=vit, config=config, classes=["a"], images=10))
    assert resume.check_same_model(one, {**vit, "hidden_dropout": 0.5}, config, ["a"], 10) == []
    (note,) = resume.check_same_model(one, vit, config, ["a"], 12)
    assert "has 12 training images" in note and "had 10" in note
    for key, value in [("gelu_approximate", "tanh"), ("layernorm_eps", 1e-5), ("mean", [0.5] * 3),
                       ("std", [0.5] * 3)]:
        changed = {**vit, key: value} if key in vit else vit, {**config, key: value}
        with pytest.raises(ValueError, match=re.escape(f"{key} {(vit | config)[key]} (this run: ")):
            resume.check_same_model(one, *changed, ["a"], 10)


def test_a_slow_disk_is_said_before_the_first_step(tmp_path, monkeypatch):
    """A checkpoint of 3 GB on a disk of 2.5 GB/s does not fit into 6 s less 5, and does into 9."""
    def slow(path, write):
        time.sleep(2**30 / 2.5e9)
        path.write_bytes(b"")
    monkeypatch.setattr(resume, "write_synced", slow)
    (line,) = resume.check_room(tmp_path, int(3e9), 6)
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in line
    assert resume.check_room(tmp_path, int(3e9), 9) == []
    assert names(tmp_path / "checkpoints") == []


# ----------------------------------------------------------------------------- whole runs
class Source(Few):
    """Drawn images; `killer` signals this process as it is read, `bad` cannot be read."""
    killer, bad = None, None

    def load(self, index):
        if index == self.killer:
            os.kill(os.getpid(), signal.SIGTERM)
        if index == self.bad:
            raise OSError("cut short")
        return super().load(index)


def _runs(folder, *runs):
    """train.main once for each of `runs`, ({what is special}, flags), in this process; for each,
    what it printed, the error it ended with, and the names of the checkpoints after it."""
    found, begin, backward = [], Saver.begin, ShardedOptimizer.backward
    for special, flags in runs:
        train_set, val_set = (Source(samples.Shapes((16, 16), split), n)
                              for split, n in (("train", 320), ("val", 80)))
        train_set.bad, val_set.killer = special.get("bad"), special.get("kill_in_evaluation")
        printed, begun, losses_seen, error = [], [], [], None

        def saves(self, step, meta, begun=begun, special=special):
            begin(self, step, meta)
            begun.append(step)
            if special.get("kill_in_save") == step:
                os.kill(os.getpid(), signal.SIGTERM)

        def poisoned(self, loss, last=True, seen=losses_seen, special=special):
            seen.append(loss)
            backward(self, loss * float("inf") if len(seen) in special.get("poison", ()) else loss,
                     last)
        Saver.begin, ShardedOptimizer.backward = saves, poisoned
        train.Run.__init__.__globals__["Log"].print = lambda self, text, to=printed: to.append(text)
        common = list(TRAIN_FLAGS)
        if "--epochs" in flags:
            at = common.index("--max-steps")
            del common[at:at + 2]
        argv = [*common, "--output-dir", f"{folder}/out", *map(str, flags)]
        if special.get("forget"):  # as a checkpoint whose evaluation a signal cut off
            path = complete_checkpoints(Path(folder) / "out" / "checkpoints")[-1]
            checkpoint.write_meta(path, {**read_meta(path), "result": None})
        try:
            train.main(argv, (train_set, val_set))
        except SystemExit as e:
            error = str(e)
        output = Path(argv[len(argv) - 1 - argv[::-1].index("--output-dir") + 1])
        lines = [json.loads(x) for x in (output / "metrics.jsonl").read_text().splitlines()]
        newest = read_meta(complete_checkpoints(output / "checkpoints")[-1])
        found.append(dict(text="\n".join(printed), error=error, begun=begun, lines=lines,
                          names=names(output / "checkpoints"), meta=newest))
    return found


def runs(folder, *more):
    return run_ranks(1, _runs, str(folder), *more)[0][0]


def test_a_run_that_was_rewound_never_goes_on_from_what_it_left(tmp_path):
    """Steps 2 to 8 are there; --resume step_4 --keep-last 1 moves 6 and 8 aside, by name, and keeps
    what it saves; the same command goes on from that, not from step 4, and auto too, and again the
    same command, though step 4 is gone. A directory that began with another run's checkpoint
    likewise; with a third one's it is refused."""
    out, other = tmp_path / "out", tmp_path / "other"
    four = ["--resume", out / "checkpoints" / "step_00000004", "--save-interval", 2]
    away = ["--output-dir", other, "--resume", out]
    first, rewound, again, auto, third, begun, on = runs(
        tmp_path, ({}, ["--max-steps", 8, "--save-interval", 2, "--keep-last", 0]),
        ({}, [*four, "--max-steps", 6, "--keep-last", 1]), ({}, [*four, "--max-steps", 8]),
        ({}, ["--max-steps", 9]), ({}, [*four, "--max-steps", 9]),
        ({}, [*away, "--max-steps", 10]), ({}, [*away, "--max-steps", 11]))
    assert first["names"] == [f"step_0000000{n}" for n in (2, 4, 6, 8)]
    assert rewound["names"] == ["step_00000006"] and "step 4, image 128" in rewound["text"]
    assert names(out / "abandoned") == ["step_00000006", "step_00000008"]
    assert f"moved to {out}/abandoned/step_00000008" in rewound["text"]
    assert f"resuming from {out}/checkpoints/step_00000006" in again["text"]
    assert again["names"] == ["step_00000006", "step_00000008"]
    assert f"resuming from {out}/checkpoints/step_00000008" in auto["text"]
    for text in (third["text"], begun["text"]):
        assert f"resuming from {out}/checkpoints/step_00000009" in text
    assert f"resuming from {other}/checkpoints/step_00000010" in on["text"]
    assert "(was auto)" not in rewound["text"] and f"(was {out})" not in begun["text"]  # as it says
    assert losses(auto["lines"]).keys() == set(range(1, 10))
    save_checkpoint(tmp_path / "third" / "checkpoints", 1, optimizer_of(ViT(TINY), Grid()), {})
    with pytest.raises(ValueError, match="would mix its line with the other checkpoints in"):
        resume.find_resume(str(other), str(tmp_path / "third"))


def test_a_signal_costs_no_save_and_no_evaluation(tmp_path):
    """SIGTERM just after a save began: that save is waited for and not made again. In the middle of
    an evaluation: `stopped`, with the checkpoint; the resumed run makes the evaluation up before it
    goes on, and one that is stopped in that names the checkpoint that is there and saves nothing.
    A finished command repeated says the same and adds no line, also where it evaluates once more.
    --keep-best saves each evaluation."""
    flags = ["--max-steps", 6, "--eval-interval", 2, "--keep-best", 1, "--keep-last", 0]
    cut = {"kill_in_evaluation": 5}
    saved, one, two, whole, again, forgot = runs(
        tmp_path, ({"kill_in_save": 2}, ["--save-interval", 2, "--output-dir", tmp_path / "a"]),
        (cut, flags), (cut, flags), ({}, flags), ({}, flags), ({"forget": True}, flags))
    assert saved["begun"] == [2] and saved["names"] == ["step_00000002"]
    for stopped in (saved, one, two):
        assert "stopped by SIGTERM at step 2; saved" in stopped["text"]
        assert "done" not in stopped["text"] and stopped["names"] == ["step_00000002"]
    assert one["begun"] == [2] and two["begun"] == [] and one["meta"]["result"] is None
    kinds = [(x["step"], "val_loss" in x) for x in whole["lines"] if "resumed" not in x]
    assert kinds == [(step, kind) for step in range(1, 7) for kind in (False, True)[:2 - step % 2]]
    assert whole["begun"] == [4, 6] and len(whole["names"]) == 3
    made_up = read_meta(tmp_path / "out/checkpoints/step_00000002")["result"]
    assert made_up["val_count"] == 80 and (tmp_path / "out/best/meta.json").exists()
    assert again["lines"] == whole["lines"] and again["begun"] == forgot["begun"] == []
    assert forgot["lines"] == whole["lines"] and forgot["meta"]["result"]["val_count"] == 80
    last = [x["text"].splitlines()[-1] for x in (whole, again)]
    assert last[0].split(" images/s")[0].split(" images")[0] == last[1].split(" images")[0]


def test_counts_and_facts_go_on_after_a_restart(tmp_path):
    """An unreadable image of the first steps is still counted, and named once, when the run goes on
    with the next; bad steps before and after a restart add up to three in a row, which end it with
    the newest checkpoint's name. Mean, deviation and epsilon are the checkpoint's where no flag
    gives them; what flags change is said. A part of the epochs with batch 32, the rest with 64:
    their images are seen."""
    bad = int(data.order(320, 0, 0)[5])
    own = ["--mean", "0.5,0.4,0.3", "--layernorm-eps", 1e-5]
    out = ["--output-dir", tmp_path / "b", "--max-unreadable", 0.1]
    first, third, half, end = runs(
        tmp_path, ({"poison": (2, 3)}, [*own, "--max-steps", 3]),
        ({"poison": (1,)}, ["--max-steps", 6, "--micro-batch-size", 16]),
        ({"bad": bad, "kill_in_save": 5}, [*out, "--save-interval", 5, *EPOCHS]),
        ({"bad": bad}, [*out, "--global-batch-size", 64, *EPOCHS]))
    assert first["meta"]["counts"]["bad_steps"] == 2 and first["error"] is None
    assert re.match("train.py: error: non-finite gradients in 3 steps in a row, the last one 4; "
                    f"lower .*The newest checkpoint: {tmp_path}/out/checkpoints/step_00000003$",
                    third["error"])
    assert "steps skipped for their gradients: 2; " in third["text"]
    assert ("note: other than in the checkpoint: --micro-batch-size 16 (was not given), "
            "--max-steps 6 (was 3)\n") in third["text"]
    assert third["meta"]["config"]["mean"] == [0.5, 0.4, 0.3]
    assert third["meta"]["vit"]["layernorm_eps"] == 1e-5
    assert half["text"].count("unreadable image") == 1 and half["meta"]["step"] == 5
    assert half["meta"]["counts"]["unreadable"] == end["meta"]["counts"]["unreadable"] == [bad]
    assert "; unreadable images: 1\n" in end["text"] and "unreadable image," not in end["text"]
    assert (end["meta"]["step"], end["meta"]["images_seen"]) == (5 + 7, 5 * 32 + 7 * 64)
    assert "was to take 20 steps, and takes 12 now" in end["text"]
    assert "checkpoint: --global-batch-size 64 (was 32), --save-interval 0 (was 5)\n" in end["text"]
    seen = [*range(32, 5 * 32 + 1, 32), *range(5 * 32 + 64, 5 * 32 + 7 * 64 + 1, 64)]
    assert [x["epoch"] for x in end["lines"] if "loss" in x] == [n / 320 for n in seen]
    rates = [x["lr"] for x in end["lines"] if "loss" in x]
    assert rates[5] == pytest.approx(2e-3 * (160 / 64 + 1) / 5)  # in the warm-up of 5 steps
    assert rates[-1] == pytest.approx(1e-5)


EPOCHS = ["--epochs", 2, "--min-lr", 1e-5]
